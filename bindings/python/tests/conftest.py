"""Fixtures of the Python tests. The library is $PLORA_LIBRARY, or the package's own."""

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
