"""Builds libplora.so with the project's make, and puts it into the wheel, which then fits any Python 3.

    PLORA_LIBRARY   a libplora.so to take instead of building one
    PLORA_MAKE      arguments of make, e.g. "CUDA=0 -j4"; default: CUDA as the tree was built before, else 0
"""

import os
import re
import shlex
import shutil
import subprocess

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


def version():
    with open(os.path.join(HERE, "plora", "_abi.py"), encoding="utf-8") as file:
        numbers = dict(re.findall(r"^PLORA_VERSION_(\w+) = (\d+)$", file.read(), re.MULTILINE))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH"))


def library():
    given = os.environ.get("PLORA_LIBRARY")
    if given:
        return given
    if not os.path.exists(os.path.join(ROOT, "lib", "plora.map")):
        raise SystemExit(f"the C sources are not at {ROOT}: install from a checkout, or set PLORA_LIBRARY to a libplora.so")
    build = os.environ.get("PLORA_BUILD", os.path.join(ROOT, "build"))
    arguments = shlex.split(os.environ.get("PLORA_MAKE", ""))
    if not any(argument.startswith("CUDA=") for argument in arguments):
        flags = os.path.join(build, "flags")
        has_cuda = os.path.exists(flags) and "-DPLORA_CUDA=1" in open(flags, encoding="utf-8").read()
        arguments.append(f"CUDA={int(has_cuda)}")
    result = os.path.join(build, "libplora.so")
    subprocess.run(["make", "-C", ROOT, f"BUILD={build}", *arguments, result], check=True)
    return result


class BuildWithLibrary(build_py):
    def run(self):
        built = os.path.realpath(library())
        if self.editable_mode:  # pip install -e
            shutil.copyfile(built, os.path.join(HERE, "plora", "libplora.so"))
            return
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier version had is no part of this one
        super().run()
        packed = os.path.join(self.build_lib, "plora", "libplora.so")
        shutil.copyfile(built, packed)
        if shutil.which("strip"):
            subprocess.run(["strip", "--strip-unneeded", packed], check=True)


class PlatformWheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    version=version(), cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel}, distclass=BinaryDistribution
)
