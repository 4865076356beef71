"""Weights of 8 and 4 bits: from numpy, and as bitsandbytes has quantised them, against its own dequantisation."""

import copy
import gc

import bitsandbytes
import numpy
import pytest
import torch
from torch import nn

import models
import plora
import plora.torch as pt


KINDS = ["int8", "nf4", "nested"]


# -------------------------------------------------------------------------------------------------------------- numpy


def quantised_of(kind, rows=9, columns=70, group=0):
    values = numpy.random.randn(rows, columns).astype("f")
    weight = plora.Quantised.of(values, "int8" if kind == "int8" else "nf4", nested=kind == "nested", group=group)
    return values, weight


@pytest.mark.parametrize("kind", KINDS)
def test_quantise_and_dequantise(kind):
    values, weight = quantised_of(kind)
    step = numpy.abs(values).max() * {"int8": 0.5 / 127, "nf4": 0.17, "nested": 0.2}[kind]
    got = weight.dequantise()
    assert weight.shape == got.shape == values.shape and not (numpy.abs(got - values) > step).any() and (got != 0).any()
    wide = torch.empty(values.shape, dtype=torch.bfloat16)
    torch.testing.assert_close(weight.dequantise(wide).float(), torch.from_numpy(got), rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swapped", [False, True])
def test_products_see_what_the_codes_hold(kind, swapped):
    _, weight = quantised_of(kind, 9, 70)
    full = weight.dequantise().astype("d")
    full = full.T if swapped else full
    outputs, inputs = full.shape
    model, bias = plora.Model(), numpy.random.randn(outputs).astype("f")
    model.add_quantised("layer", weight, bias, fan_in_fan_out=swapped)
    adapters = plora.Adapters(model, rank=2, alpha=4.0)
    adapters.layer(0).b[:] = numpy.random.randn(outputs, 2)
    a, b, *_, scale = adapters.layer(0)
    x, y, dx = numpy.random.randn(5, inputs).astype("f"), numpy.full((5, outputs), numpy.nan, "f"), numpy.full((5, inputs), numpy.nan, "f")
    want = full + scale * b.astype("d") @ a.astype("d")
    numpy.testing.assert_allclose(adapters.forward(0, x, y), x @ want.T + bias, rtol=0, atol=1e-4)
    numpy.testing.assert_allclose(adapters.backward(0, x, y, dx), y.astype("d") @ want, rtol=0, atol=1e-2)
    with pytest.raises(plora.Unsupported, match="without a master.*would hold"):
        adapters.unload()
    assert model.master(0) is None and adapters.stage == 0 and b.any()
    assert ((weight.dequantise().T if swapped else weight.dequantise()) == full).all()
    update = (want - full).T if swapped else want - full
    before = weight.dequantise().astype("d")
    report = adapters.unload(without_master=True)
    held_ = ((weight.dequantise() - before) * update).sum() / (update**2).sum()
    assert report.layers[0].captured == pytest.approx(held_, abs=1e-4)


def test_arrays_live_as_long_as_the_model():
    model = plora.Model()
    model.add_quantised("layer", quantised_of("nested")[1])
    want = None
    for _ in range(3):
        gc.collect()
        junk = [numpy.full(1000, 255, "B") for _ in range(100)]
        y = plora.Adapters(model, rank=1).forward(0, numpy.ones((1, 70), "f"), numpy.empty((1, 9), "f"))
        want = y if want is None else want
        assert (y == want).all() and junk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master", ["memory", "directory", "array"])
@pytest.mark.parametrize("given", [False, True])
def test_unloads_add_to_the_master(kind, master, given, tmp_path):
    values, weight = quantised_of(kind, group=10 if kind == "int8" else 0)
    model = plora.Model()
    start = values.copy() if given or master == "array" else weight.dequantise()
    where = {"memory": "memory", "directory": tmp_path, "array": values}[master]
    model.add_quantised("layer", weight, master=where, values=values if given and master != "array" else None)
    numpy.testing.assert_array_equal(model.master(0), start)
    adapters = plora.Adapters(model, rank=2, alpha=4.0)
    for _ in range(2):
        adapters.layer(0).b[:] = 0.01 * numpy.random.randn(*adapters.layer(0).b.shape)
        a, b, *_, scale = adapters.layer(0)
        start = start + scale * b.astype("d") @ a.astype("d")
        report = adapters.unload()
        assert report.captured > 0.999 and report.layers[0].quantised_rms > 0
        numpy.testing.assert_allclose(model.master(0), start, rtol=0, atol=1e-5)
    again = plora.Quantised.of(model.master(0), weight.format, nested=kind == "nested", group=weight.group)
    if kind != "nested":  # the layer keeps its offset
        assert (again.codes == weight.codes).all() and (again.scales == weight.scales).all()
    model.master(0)[:] = 1.0
    model.requantise()
    numpy.testing.assert_allclose(weight.dequantise(), 1.0, rtol=0.02)
    if master == "array":
        assert (values == 1.0).all()


def test_what_is_wrong_is_said():
    _, weight = quantised_of("nested")
    parts = dict(nested_codes=weight.nested_codes, map=weight.map, offset=weight.offset)
    for kind, call in [
        (plora.InvalidArgument, lambda: plora.Quantised("fp4", (9, 70), weight.codes, weight.scales)),
        (plora.ShapeMismatch, lambda: plora.Quantised("nf4", (9, 70), weight.codes[:-1], weight.scales, **parts)),
        (plora.ShapeMismatch, lambda: plora.Quantised("nf4", (9, 70), weight.codes, weight.scales)),
        (plora.ShapeMismatch, lambda: plora.Quantised("nf4", (-1, 70), weight.codes, weight.scales, **parts)),
        (plora.Unsupported, lambda: plora.Quantised("nf4", (9, 70), weight.codes.astype("f"), weight.scales, **parts)),
        (plora.Unsupported, lambda: plora.Quantised("nf4", (9, 35), weight.codes[::2], weight.scales, **parts)),
        (plora.InvalidArgument, lambda: plora.Quantised("nf4", (9, 70), weight.codes, weight.scales, map=weight.map)),
        (plora.Unsupported, lambda: plora.Model().add_linear("layer", numpy.zeros((3, 4), "b"))),
        (plora.InputOutput, lambda: plora.Model().add_quantised("layer", weight, master="/nowhere")),
        (plora.InvalidArgument, lambda: plora.Model().add_quantised("layer", weight, values=numpy.zeros((9, 70), "f"))),
        (plora.NonFinite, lambda: plora.Model().add_quantised("layer", weight, master="memory", values=numpy.full((9, 70), numpy.nan, "f"))),
        (plora.NonFinite, lambda: plora.Quantised.of(numpy.full((9, 70), numpy.inf, "f"))),
        (plora.NotFound, lambda: plora.Model().master(0) or pytest.fail("no layer")),
    ]:  # fmt: skip
        with pytest.raises((kind, plora.InvalidArgument) if kind is plora.NotFound else kind):
            call()


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def module_of(kind, inputs=64, outputs=48, dtype=torch.float32, bias=True):
    plain = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    if kind == "int8":
        module = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=bias, has_fp16_weights=False)
    else:
        module = bitsandbytes.nn.LinearNF4(inputs, outputs, bias=bias, compress_statistics=kind == "nested")
    module.load_state_dict(plain.state_dict())
    return module.to("cpu"), plain.weight.detach().float()


def held(module):
    """W as bitsandbytes sees it."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        return bitsandbytes.functional.dequantize_4bit(weight.data, state).view(state.shape)
    scb = weight.SCB if weight.SCB is not None else module.state.SCB
    return weight.data.float() * (scb.view(-1, 1) * (1.0 / 127.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [False, True])
def test_gradients(kind, dtype, used):
    """Against autograd over the weight that bitsandbytes dequantises, before and after its own forward has run."""
    module, _ = module_of(kind)
    if used:
        module(torch.randn(2, 64, requires_grad=True))
    full, bias = held(module).double(), module.bias.detach().double()
    pointers = [module.weight.data_ptr()]
    adapters = pt.attach(nn.Sequential(module), 3, 6)
    a, b, a_gradient, b_gradient, scale = adapters.layer("0")
    b.copy_(0.1 * torch.randn(b.shape))
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    want = wide[0] @ full.T + bias + scale * wide[0] @ wide[1].T @ wide[2].T
    want.backward(dy.double())
    close = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    assert y.dtype == dtype and x.grad.dtype == dtype
    for got, ref in ((y, want), (x.grad, wide[0].grad), (a_gradient, wide[1].grad), (b_gradient, wide[2].grad)):
        assert not ((got.double() - ref).abs().max() > close * (1 + ref.abs().max())), (got, ref)
    with adapters.disabled():
        torch.testing.assert_close(module(x).double(), wide[0] @ full.T + bias, rtol=close, atol=close)
    with pytest.raises(plora.Unsupported, match="without a master.*would hold"):
        adapters.unload()
    adapters.detach()
    assert pointers == [module.weight.data_ptr()] and torch.equal(held(module).double(), full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("place", ["memory", "directory"])
def test_unload_into_a_master(kind, given, place, tmp_path):
    module, original = module_of(kind)
    held_before, codes = held(module), module.weight.data_ptr()
    model = nn.Sequential(module)
    adapters = pt.attach(model, 3, 6, master="memory" if place == "memory" else tmp_path, originals={"0": original} if given else None)
    torch.testing.assert_close(held(module), held_before, rtol=1e-2, atol=1e-3)
    optimizer, start = pt.AdamW(adapters, lr=1e-2), (original if given else held_before).double()
    total = torch.zeros_like(start)
    for _ in range(3):
        a, b, *_, scale = adapters.layer("0")
        b.copy_(0.02 * torch.randn(b.shape))
        total += scale * b.double() @ a.double()
        report = adapters.unload(optimizer)
        assert report.captured > 0.999
    master = torch.from_numpy(adapters.core.model.master(0))
    torch.testing.assert_close(master.double(), start + total, rtol=0, atol=1e-5)
    error = (held(module) - master).norm() / master.norm()
    assert not error > {"int8": 0.01, "nf4": 0.12, "nested": 0.12}[kind] and module.weight.data_ptr() == codes
    digest = adapters.digest()
    adapters.detach()
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x), x @ held(module).T + module.bias, rtol=2e-2, atol=2e-2)
    assert digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master", [None, "memory"])
def test_resume_to_the_bit(kind, master):
    def start():
        torch.manual_seed(7)
        model = nn.Sequential(module_of(kind)[0], nn.Tanh(), module_of(kind, 48, 32)[0])
        adapters = pt.attach(model, 3, 6, master=master)
        return model, adapters, pt.AdamW(adapters, lr=1e-2, schedule="cosine", period=9)

    def train(model, adapters, optimizer, steps):
        for step in steps:
            model(torch.randn(6, 64, generator=torch.Generator().manual_seed(step))).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 2 and master:
                adapters.unload(optimizer)

    model, adapters, optimizer = start()
    train(model, adapters, optimizer, range(4))
    saved = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    train(model, adapters, optimizer, range(4, 8))
    want = adapters.digest(), adapters.stage
    model, adapters, optimizer = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, adapters, optimizer, range(4, 8))
    assert (adapters.digest(), adapters.stage) == want
    if kind == "nested":
        other = dict(saved[0])
        key = "0.weight.quant_state.bitsandbytes__nf4"
        other[key] = torch.tensor(list(bytes(other[key].tolist()).replace(b'"nested_offset": ', b'"nested_offset": 1')), dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="quant_state"):
            model.load_state_dict(other)


def test_tied_and_mixed():
    module, _ = module_of("nf4", 64, 64)
    other = bitsandbytes.nn.LinearNF4(64, 64)
    other.weight = module.weight
    model = nn.Sequential(module, other, nn.Linear(64, 64), module_of("int8", 64, 64)[0])
    adapters = pt.attach(model, 2, master="memory")
    for name in adapters.layers:
        adapters.layer(name).b.normal_(std=0.02)
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = model(x)
        report = adapters.unload()
        assert report.weights == 3 and len(adapters.layers) == 4
        torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.3)


def test_what_is_refused_is_named():
    def fp4(module):
        return bitsandbytes.nn.LinearFP4(64, 48).to("cpu")

    def unquantised(module):
        return bitsandbytes.nn.LinearNF4(64, 48)

    def coarse(module):
        module.weight.quant_state.blocksize = 128
        return module

    def packed(module):
        module.weight.quant_state.packing_format_for_cpu = True
        return module

    def half(_):
        return bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=True)

    def lost(_):
        module = module_of("int8")[0]
        module.weight.SCB = None
        return module

    for change, word in ((fp4, "fp4"), (unquantised, "not quantised yet"), (coarse, "128"), (packed, "packed"), (half, "int8"), (lost, "SCB")):
        model = nn.Sequential(change(module_of("nf4")[0]))
        with pytest.raises(plora.Unsupported, match=word):
            pt.attach(model, 2)
        assert not hasattr(model[0], "_plora_layer")
    model = nn.Sequential(module_of("nf4")[0])
    before = held(model[0]).clone()
    for options, kind in (
        ({"rank": 99}, plora.InvalidArgument), ({"master": "/nowhere"}, plora.InputOutput), ({"originals": {"0": before}}, plora.InvalidArgument),
        ({"originals": {"1": before}}, plora.NotFound), ({"originals": {"0": before[:1]}}, plora.InvalidArgument),
        ({"originals": {"0": before.double()}}, plora.InvalidArgument), ({"originals": {"0": before * float("nan")}}, plora.InvalidArgument),
    ):  # fmt: skip
        if "originals" in options and kind is not plora.InvalidArgument or "originals" in options and options["originals"].get("0") is not before:
            options = {**options, "master": "memory"}
        with pytest.raises(kind):
            pt.attach(model, **{"rank": 2, **options})
        assert torch.equal(held(model[0]), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_has_quantised(bits, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    models.llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32)
    adapters = pt.attach(model, 4, master="memory")
    optimizer, losses = pt.AdamW(adapters, lr=1e-2), []
    assert len(adapters.layers) == 14
    for step in range(12):
        loss = models.loss_of(model, models.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 5:
            assert adapters.unload(optimizer).captured > 0.99
    assert losses[5] < losses[0] - 0.05 and losses[-1] < losses[5]
