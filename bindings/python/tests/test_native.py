"""The ctypes declarations against plora.h, the way a library is found, and calls that must fail well."""

import ctypes
import gc
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy
import pytest

import plora
from conftest import ROOT
from plora import _abi, _native

HEADER = os.path.join(ROOT, "include", "plora.h")


def run_python(code, **environment):
    package = os.path.dirname(os.path.dirname(plora.__file__))
    full = dict(os.environ, PYTHONPATH=package, **environment)
    return subprocess.run([sys.executable, "-c", code], env=full, text=True, capture_output=True, check=False)


# ------------------------------------------------------------------------------------------------------------- header


@pytest.fixture(scope="module")
def header():
    with open(HEADER, encoding="utf-8") as file:
        return file.read()


def test_functions_are_those_of_the_header(header):
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    declared = set(re.findall(r"PLORA_API [^;]*?\b(plora_\w+)\(", code))
    assert declared and declared == set(_abi.FUNCTIONS)
    for name, (_, arguments) in _abi.FUNCTIONS.items():
        text = re.search(rf"\b{name}\((.*?)\);", code, re.DOTALL).group(1).strip()
        assert len(arguments) == (0 if text == "void" else text.count(",") + 1), name


def test_layout_is_the_compilers(tmp_path):
    """Size of every struct, offset and size of every field, every constant, as a C program prints them."""
    structs = [kind for kind in vars(_abi).values() if isinstance(kind, type) and issubclass(kind, ctypes.Structure)]
    structs = [kind for kind in structs if kind is not ctypes.Structure]
    constants = {name: value for name, value in vars(_abi).items() if name.startswith("PLORA_")}
    assert len(structs) > 10 and len(constants) > 30
    lines, expected = [], []
    for kind in structs:
        name = kind.__name__
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(kind)}")
        for field, *_ in kind._fields_:
            lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));')
            expected.append(f"{name}.{field} {getattr(kind, field).offset} {getattr(kind, field).size}")
    for name, value in constants.items():
        lines.append(f'printf("{name} %lld\\n", (long long){name});')
        expected.append(f"{name} {value}")
    source, program = tmp_path / "probe.c", tmp_path / "probe"
    source.write_text('#include <stdio.h>\n#include "plora.h"\nint main(void)\n{\n' + "\n".join(lines) + "\n}\n")
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, "-I", os.path.dirname(HEADER), "-o", program, source], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")[:-1] == expected


def test_defaults_are_those_of_the_init_macros(header):
    for name in re.findall(r"#define (PLORA_\w+)_INIT\b", header):
        kind = getattr(_abi, name.lower())
        assert hasattr(kind, "_defaults_"), name
        made = _native.struct(name.lower()[len("plora_") :])
        if kind._fields_[0][0] == "struct_size":  # else it lies inside another
            assert made.struct_size == ctypes.sizeof(kind)
    assert _native.struct("optimizer_options").beta2 == 0.999
    assert _native.struct("unload_options").rounding == -1


def test_status_codes_have_exceptions(header):
    codes = {int(value) for value in re.findall(r"X\(PLORA_ERROR_\w+, (\d+),", header)}
    assert codes == set(_native._ERRORS)
    for code, kind in _native._ERRORS.items():
        with pytest.raises(kind) as caught:
            _native.check(code)
        assert caught.value.status == code and isinstance(caught.value, plora.Error)


# ------------------------------------------------------------------------------------------------------------ loading


def test_needs_neither_numpy_nor_torch():
    code = "import sys, plora, plora._native; plora.Model(); print([m for m in ('numpy', 'torch') if m in sys.modules])"
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name, word", [("missing.so", "cannot be loaded"), ("libm.so.6", "is not libplora")])
def test_a_wrong_library_is_an_import_error(name, word):
    result = run_python("import plora", PLORA_LIBRARY=name)
    assert result.returncode == 1 and "ImportError" in result.stderr and word in result.stderr


def test_another_abi_version_is_refused(tmp_path):
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text("int plora_abi_version(void) { return 7777; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    result = run_python("import plora", PLORA_LIBRARY=str(library))
    assert "ABI version 7777" in result.stderr and "ImportError" in result.stderr


# -------------------------------------------------------------------------------------------------------------- calls


def model_of(rows=5, columns=7, dtype=numpy.float32):
    weight = numpy.random.randn(rows, columns).astype(dtype)
    model = plora.Model()
    model.add_linear("layer", weight)
    return model, weight


def test_forward_backward_step_unload():
    model, weight = model_of()
    adapters = plora.Adapters(model, rank=2, alpha=6.0)
    optimizer = plora.Optimizer(adapters, lr=0.1)
    x, y, dx = numpy.random.randn(4, 7).astype("f"), numpy.full((4, 5), numpy.nan, "f"), numpy.full((4, 7), numpy.nan, "f")
    for _ in range(3):
        adapters.forward(0, x, y)
        adapters.backward(0, x, numpy.ones_like(y), dx)
        assert optimizer.step(report=True).gradient_norm > 0
        optimizer.zero_gradients()
    a, b, *_, scale = adapters.layer(0)
    assert scale == 3.0
    full = weight.astype("d") + 3.0 * b.astype("d") @ a.astype("d")
    numpy.testing.assert_allclose(adapters.forward(0, x, y), x @ full.T, rtol=0, atol=1e-5)
    numpy.testing.assert_allclose(adapters.backward(0, x, y, dx), y @ full, rtol=0, atol=1e-4)
    assert not numpy.array_equal(weight, full.astype("f")) and b.any()
    report = adapters.unload(optimizer)
    numpy.testing.assert_allclose(weight, full, rtol=0, atol=1e-6)
    assert adapters.stage == 1 and not adapters.layer(0).b.any() and report.layers[0].name == "layer"
    assert not adapters.gradients.any() and not optimizer.moments()[0].any()


def test_dlpack_and_bfloat16():
    torch = pytest.importorskip("torch")
    weight, x = torch.randn(5, 7).bfloat16(), torch.randn(3, 7).bfloat16()
    model = plora.Model()
    model.add_linear("layer", weight, bias=torch.arange(5.0))
    y = torch.empty(3, 5)
    plora.Adapters(model, rank=1).forward(0, x, y)
    torch.testing.assert_close(y, x.float() @ weight.float().T + torch.arange(5.0), rtol=0, atol=1e-1)
    del weight, x
    gc.collect()
    assert model.layer(0)["dtype"] == "bfloat16" and model.layer(0)["weight"].shape == (5, 7)


@pytest.mark.parametrize(
    "what, kind",
    [
        (lambda a, m: a.forward(0, numpy.zeros((3, 6), "f"), numpy.zeros((3, 5), "f")), plora.ShapeMismatch),
        (lambda a, m: a.forward(0, numpy.zeros((3, 7)), numpy.zeros((3, 5), "f")), plora.Unsupported),
        (lambda a, m: a.forward(0, numpy.zeros((3, 7), ">f4"), numpy.zeros((3, 5), "f")), plora.Unsupported),
        (lambda a, m: a.forward(0, numpy.zeros((3, 14), "f")[:, ::2], numpy.zeros((3, 5), "f")), plora.Unsupported),
        (lambda a, m: a.forward(0, numpy.zeros((3, 7), "f"), numpy.broadcast_to(numpy.zeros(5, "f"), (3, 5))), plora.Error),
        (lambda a, m: a.forward(0, numpy.zeros((2, 3, 7), "f"), numpy.zeros((3, 5), "f")), plora.ShapeMismatch),
        (lambda a, m: a.forward(3, numpy.zeros((3, 7), "f"), numpy.zeros((3, 5), "f")), plora.InvalidArgument),
        (lambda a, m: a.forward(0, [1, 2], None), TypeError),
        (lambda a, m: a.unload(momentum=0.0), plora.InvalidArgument),
        (lambda a, m: a.unload(rounding="up"), plora.InvalidArgument),
        (lambda a, m: plora.Adapters(m, rank=6), plora.InvalidArgument),
        (lambda a, m: plora.Adapters(m, rank=2**40), plora.InvalidArgument),
        (lambda a, m: plora.Adapters(m, rank=1, targets="q_proj"), plora.NotFound),
        (lambda a, m: plora.Adapters(m, rank=1, targets=[]), plora.InvalidArgument),
        (lambda a, m: plora.Adapters.load(m, "/nowhere"), plora.InputOutput),
        (lambda a, m: plora.Optimizer(a, lr=-1), plora.InvalidArgument),
        (lambda a, m: m.find("other"), plora.NotFound),
        (lambda a, m: plora.Context(backend="tpu"), plora.InvalidArgument),
    ],
)
def test_bad_calls_raise(what, kind):
    model, weight = model_of()
    adapters, before = plora.Adapters(model, rank=2), weight.copy()
    with pytest.raises(kind):
        what(adapters, model)
    assert (weight == before).all() and adapters.stage == 0


def test_read_only_weights_are_refused():
    weight = numpy.zeros((3, 4), "f")
    weight.flags.writeable = False
    with pytest.raises(plora.InvalidArgument, match="read-only"):
        plora.Model().add_linear("layer", weight)


def test_any_order_of_ends():
    """Views outlive their objects, objects their parents; closed objects answer with an error."""
    import itertools

    for order in itertools.permutations(range(4)):
        model, _ = model_of()
        adapters = plora.Adapters(model, rank=2)
        things = [model.context, model, adapters, plora.Optimizer(adapters)]
        view, weight = adapters.parameters, model.layer(0)["weight"]
        del adapters, model, _
        for i in order:
            things[i].close()
            with pytest.raises(plora.Error, match="closed"):
                _ = things[i].handle
        del things
        view += 1.0
        weight += 1.0


def test_copies_are_refused():
    import copy
    import pickle

    model, _ = model_of()
    for thing in (model, model.context, plora.Adapters(model, rank=1)):
        for how in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be pickled or copied"):
                how(thing)


def test_nothing_leaks():
    """What the library holds ends with its objects, over many of them."""
    context = plora.Context()
    start = context.memory()["current_bytes"]
    for _ in range(50):
        model = plora.Model(context)
        model.add_linear("layer", numpy.zeros((64, 64), "f"))
        adapters = plora.Adapters(model, rank=4)
        plora.Optimizer(adapters)
        assert context.memory()["current_bytes"] > start
        del model, adapters
        assert context.memory()["current_bytes"] == start


def test_two_interpreters_load_and_unload(tmp_path):
    """Import, use, drop and import again, in one process as in several: no crash at exit, no growth."""
    code = """
import gc, resource, sys, numpy
for i in range(30):
    import plora
    model = plora.Model(); model.add_linear("layer", numpy.zeros((512, 512), "f"))
    adapters = plora.Adapters(model, rank=8); adapters.unload()
    del adapters, model
    for name in [n for n in sys.modules if n.startswith("plora")]: del sys.modules[name]
    del plora; gc.collect()
    if i == 5: before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    for _ in range(2):
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) < 8 * 1024, "KiB more after 24 more imports"


def test_the_interpreters_lock_is_free_during_calls():
    model, _ = model_of(256, 256)
    adapters = plora.Adapters(model, rank=4)
    x, y = numpy.zeros((4096, 256), "f"), numpy.zeros((4096, 256), "f")
    ticks, done = [0], threading.Event()

    def count():
        while not done.is_set():
            ticks[0] += 1
            time.sleep(1e-5)  # gives the lock up by itself

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # the other thread runs only when this one gives the lock up
    try:
        thread.start()
        before = ticks[0]
        for _ in range(5):
            adapters.forward(0, x, y)
        assert ticks[0] > before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()


def test_ledger_and_files(tmp_path):
    model, weight = model_of()
    first = weight.copy()
    adapters = plora.Adapters(model, rank=2, seed=3)
    original = plora.Model()
    original.add_linear("layer", first)
    ledger = plora.Ledger(adapters, tmp_path / "ledger", original=original)
    for _ in range(3):
        adapters.layer(0).b[:] = numpy.random.randn(5, 2)
        adapters.unload()
    last = weight.copy()
    assert len(ledger) == 3 == ledger.position and not (last == first).all()
    a, b, factor = ledger.factors(0, 0)
    assert a.shape == (2, 7) and b.shape == (5, 2) and factor == 8.0
    report = ledger.export(tmp_path / "adapter", live=False)
    assert report["rank"] == 6 and (tmp_path / "adapter" / "adapter_config.json").exists()
    ledger.roll_back(0)
    assert (weight == first).all()
    ledger.roll_back(3)
    assert (weight == last).all()
    ledger.verify()
    adapters.layer(0).b[:] = 1
    adapters.save(tmp_path / "live")
    again = plora.Adapters.load(model, pathlib.Path(tmp_path / "live"))
    assert (again.layer(0).b == 1).all() and (again.layer(0).a == adapters.layer(0).a).all()


def test_checkpoint_resumes_to_the_bit(tmp_path):
    runs = []
    for resumed in (False, True):
        numpy.random.seed(1)
        model, weight = model_of()
        adapters = plora.Adapters(model, rank=2)
        optimizer = plora.Optimizer(adapters, schedule="cosine", period=20, warmup=2)
        if resumed:
            plora.load_checkpoint(adapters, optimizer, tmp_path / "checkpoint")
        for step in range(3 if resumed else 0, 8):
            if step == 3 and not resumed:
                plora.save_checkpoint(adapters, optimizer, tmp_path / "checkpoint")
            adapters.gradients[:] = numpy.sin(numpy.arange(adapters.gradients.size) + step)
            optimizer.step()
        runs.append(adapters.parameters.copy())
    assert (runs[0] == runs[1]).all()
