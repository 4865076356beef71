"""plora.torch: gradients against autograd, whole models against PEFT, state, and what must be refused."""

import copy
import gc
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import models
import plora
import plora.torch as pt

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def set_b(adapters, scale=0.1):
    """B of a fresh adapter is 0, which hides errors."""
    for name in adapters.layers:
        adapters.layer(name).b.copy_(scale * torch.randn(adapters.layer(name).b.shape))


# ---------------------------------------------------------------------------------------------------------- gradients

LAYOUTS = {
    "plain": lambda t: t,
    "rows apart": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
    "elements apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.sampled_from([(1,), (7,), (2, 3), (0,), (), (1, 13, 1), (131,)]),
    inputs=st.sampled_from([1, 2, 17, 32]),
    outputs=st.sampled_from([1, 3, 31, 64]),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    bias=st.booleans(),
    base=st.sampled_from(["torch", "library"]),
    want_dx=st.booleans(),
    transposed_weight=st.booleans(),
)
def test_gradients(tokens, inputs, outputs, rank, dtype, layout, bias, base, want_dx, transposed_weight):
    rank = min(rank, inputs, outputs)
    module = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    if transposed_weight:
        module.weight.data = module.weight.data.t().contiguous().t()
    x = LAYOUTS[layout](torch.randn(*tokens, inputs).to(dtype)).detach().requires_grad_(want_dx)
    with pt.attach(nn.Sequential(module), rank, 2.0 * rank, base=base) as adapters:
        set_b(adapters)
        a, b, a_gradient, b_gradient, scale = adapters.layer("0")
        y = module(x)
        dy = torch.randn(y.shape).to(dtype)
        y.backward(dy)

        wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
        weight, bias_ = module.weight.double(), module.bias.double() if bias else None
        want = functional.linear(wide[0], weight, bias_) + scale * wide[0] @ wide[1].T @ wide[2].T
        want.backward(dy.double())
        eps = EPS[dtype]
        flat = wide[0].reshape(-1, inputs).abs()
        size = flat @ weight.abs().T + scale * flat @ wide[1].abs().T @ wide[2].abs().T + 1
        grow = 4 * eps * (4 + inputs**0.5)
        assert not ((y.double() - want).reshape(-1, outputs).abs() > grow * size).any()
        if want_dx:
            upper = dy.double().reshape(-1, outputs).abs() @ (weight.abs() + scale * wide[2].abs() @ wide[1].abs()) + 1
            assert x.grad.dtype == dtype and x.grad.shape == x.shape
            assert not ((x.grad.double() - wide[0].grad).reshape(-1, inputs).abs() > 4 * eps * (4 + outputs**0.5) * upper).any()
        count = max(1, flat.shape[0])
        for got, ref in ((a_gradient, wide[1].grad), (b_gradient, wide[2].grad)):
            ref = torch.zeros_like(got).double() if ref is None else ref
            error, bound = (got.double() - ref).norm(), 16 * eps * (ref.norm() + count**0.5 * scale)
            assert not error > bound, (error, bound)


def test_gradients_add_up_and_zero():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    adapters = pt.attach(model, 2)
    set_b(adapters)
    x = torch.randn(3, 6)
    model(x).sum().backward()
    once = adapters.gradients.clone()
    model(x).sum().backward()
    torch.testing.assert_close(adapters.gradients, 2 * once)
    for zero in (model.zero_grad, lambda: model.zero_grad(set_to_none=False), pt.AdamW(adapters).zero_grad,
                 torch.optim.SGD([adapters.parameters], 0.1).zero_grad):  # fmt: skip
        zero()
        model(x).sum().backward()
        torch.testing.assert_close(adapters.gradients, once)
        assert adapters.parameters.grad is adapters.gradients
    adapters.parameters.grad = 3 * once  # as a host does that clips or averages into new memory
    model(x).sum().backward()
    torch.testing.assert_close(adapters.gradients, 4 * once)


def test_checkpointing_and_dropout():
    """A layer run again in the backward draws the mask of its first run, also when two forward passes came before."""
    from torch.utils.checkpoint import checkpoint

    def run(again):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        adapters = pt.attach(model, 4, dropout=0.5, seed=5)
        torch.manual_seed(4)
        set_b(adapters)
        inner = nn.Sequential.forward
        model.forward = lambda x: checkpoint(inner, model, x, use_reentrant=False) if again else inner(model, x)
        x = torch.randn(9, 16, requires_grad=True)
        first, second = model(x), model(x)
        assert not torch.equal(first, second)
        (first.sum() + 2 * second.sum()).backward()
        model.eval()
        assert torch.equal(model(x), model(x))
        return first.detach(), second.detach(), x.grad, adapters.gradients.clone()

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_autocast():
    model = nn.Sequential(nn.Linear(32, 24))
    adapters = pt.attach(model, 4)
    set_b(adapters)
    x = torch.randn(5, 32, requires_grad=True)
    model(x).sum().backward()
    want, dx = adapters.gradients.clone(), x.grad
    x.grad = None
    adapters.gradients.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, dx, rtol=0.05, atol=0.05)
    torch.testing.assert_close(adapters.gradients, want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_does_not_break(backend):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    adapters = pt.attach(model, 2)
    set_b(adapters)
    x = torch.randn(4, 8)
    model(x).pow(2).sum().backward()
    want = adapters.gradients.clone()
    adapters.gradients.zero_()
    compiled = torch.compile(model, backend=backend)
    compiled(x).pow(2).sum().backward()
    torch.testing.assert_close(adapters.gradients, want)
    torch.testing.assert_close(compiled(x), model(x))


# -------------------------------------------------------------------------------------------------- models, with PEFT


def peft_of(model, adapters):
    """PEFT's layers on a copy of the model with the same A and B."""
    from peft import LoraConfig, get_peft_model

    first = adapters.layers
    names = sorted({name.rpartition(".")[2] for name in first})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out="c_attn" in names)
    other = get_peft_model(model, config)
    for name in first:
        module = other.get_submodule("base_model.model." + name)
        part = adapters.layer(name)
        module.lora_A["default"].weight.data.copy_(part.a)
        module.lora_B["default"].weight.data.copy_(part.b)
    return other


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_loss_curve_is_pefts(family, dtype, close):
    model, copied = models.FAMILIES[family](dtype), models.FAMILIES[family](dtype)
    adapters = pt.attach(model, 4, 8)
    other = peft_of(copied, adapters)
    ours = pt.AdamW(adapters, lr=1e-2)
    trained = [p for p in other.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(adapters.layer(n).a.numel() + adapters.layer(n).b.numel() for n in adapters.layers)
    theirs = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    curve = []
    for step in range(8):
        tokens = models.batch(step)
        pair = []
        for net, optimizer in ((model, ours), (other, theirs)):
            loss = models.loss_of(net, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pair.append(loss.item())
        curve.append(pair)
    curve = torch.tensor(curve)
    assert not ((curve[:, 0] - curve[:, 1]).abs() > close).any(), curve
    assert curve[-1, 0] != curve[0, 0]


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_unload_keeps_the_function_and_detach_the_model(family):
    model = models.FAMILIES[family]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    tokens = models.batch()
    plain = model(tokens).logits
    adapters = pt.attach(model, 4)
    assert torch.equal(model(tokens).logits, plain)
    set_b(adapters)
    with torch.no_grad():
        changed = model(tokens).logits
    assert not torch.allclose(changed, plain, atol=1e-3)
    with adapters.disabled(), torch.no_grad():
        assert torch.equal(model(tokens).logits, plain)
    for momentum in (0.25, 1.0):
        report = adapters.unload(momentum=momentum)
        assert report.captured > 0.99 and report.weights == len(adapters.layers)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, changed, rtol=1e-4, atol=1e-4)
    adapters.detach()
    adapters.detach()
    after = model.state_dict()
    assert list(after) == list(before) and {n: type(m) for n, m in model.named_modules()} == kinds
    assert {p: p.requires_grad for p in model.parameters()} == wanted
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == {f"{name}.weight" for name in kinds if f"{name}.weight" in differing} and differing
    torch.testing.assert_close(model(tokens).logits, changed, rtol=1e-4, atol=1e-4)
    with pytest.raises(plora.Error, match="detached"):
        adapters.unload()
    copy.deepcopy(model)


def test_full_precision_adapters_keep_what_bf16_rounds_off():
    model = models.llama(torch.bfloat16)
    adapters = pt.attach(model, 4)
    assert adapters.parameters.dtype == torch.float32
    set_b(adapters, 1e-5)
    assert adapters.unload().captured > 0.9
    nearest = models.llama(torch.bfloat16)
    adapters = pt.attach(nearest, 4, residual="none")
    set_b(adapters, 1e-5)
    assert adapters.unload().captured < 0.5


def test_tied_linears_are_merged_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    adapters = pt.attach(model, 2)
    set_b(adapters)
    part = adapters.layer("1")
    want = model[0].weight + part.scale * part.b @ part.a
    assert adapters.unload().weights == 1
    torch.testing.assert_close(model[0].weight, want)


# --------------------------------------------------------------------------------------------------------------- state


def train(model, optimizer, steps):
    for step in steps:
        models.loss_of(model, models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_to_the_bit(dtype):
    """Over an unload, from the model's state and the optimizer's."""

    def start():
        model = models.llama(dtype)
        adapters = pt.attach(model, 4, seed=2)
        return model, adapters, pt.AdamW(adapters, lr=1e-2, schedule="cosine", warmup=2, period=10)

    model, adapters, optimizer = start()
    train(model, optimizer, range(3))
    adapters.unload(optimizer)
    train(model, optimizer, range(3, 5))
    saved = copy.deepcopy(model.state_dict()), optimizer.state_dict(), adapters.digest()
    train(model, optimizer, range(5, 8))
    adapters.unload(optimizer)
    want = adapters.digest(), optimizer.learning_rate

    model, adapters, optimizer = start()
    missing = model.load_state_dict(saved[0])
    assert not missing.missing_keys and adapters.stage == 1 and adapters.digest() == saved[2]
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(5, 8))
    adapters.unload(optimizer)
    assert (adapters.digest(), optimizer.learning_rate) == want
    with pytest.raises(plora.Error):
        adapters.load_state_dict({"plora_checkpoint": torch.zeros(100, dtype=torch.uint8)})
    with pytest.raises(plora.InvalidArgument):
        adapters.load_state_dict({})
    assert adapters.digest() == want[0]


def test_pefts_format_both_ways(tmp_path):
    from peft import PeftModel

    model = models.gpt2()
    adapters = pt.attach(model, 4, 8)
    set_b(adapters)
    tokens = models.batch()
    with torch.no_grad():
        want = model(tokens).logits
    adapters.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(models.gpt2(), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, want, rtol=1e-4, atol=1e-5)
    again = models.gpt2()
    loaded = pt.from_pretrained(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, want)
    for name in adapters.layers:
        assert torch.equal(loaded.layer(name).a, adapters.layer(name).a)


def test_torch_optimizers_and_schedulers():
    model = models.llama()
    adapters = pt.attach(model, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, range(2))
    state = optimizer.state[adapters.parameters]
    first, second = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    adapters.unload(optimizer, momentum=0.75)
    torch.testing.assert_close(state["exp_avg"], first * 0.5)
    torch.testing.assert_close(state["exp_avg_sq"], second * 0.25)
    adapters.unload(optimizer)
    assert adapters.parameters not in optimizer.state
    train(model, optimizer, range(2))
    with pytest.raises(plora.InvalidArgument, match="does not have"):
        adapters.unload(torch.optim.SGD([torch.zeros(1)], 0.1))

    ours = pt.AdamW(adapters, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1 / (1 + step))
    for step in range(3):
        assert ours.learning_rate == pytest.approx(1e-2 / (1 + step))
        train(model, ours, [step])
        scheduler.step()


def test_optimizer_is_torchs():
    """AdamW and SGD against torch's on the same gradients."""
    for make, other in (
        (lambda a: pt.AdamW(a, lr=1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        (lambda a: pt.SGD(a, lr=1e-2, momentum=0.9), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
    ):
        adapters = pt.attach(nn.Sequential(nn.Linear(9, 7)), 3)
        set_b(adapters)
        twin = nn.Parameter(adapters.parameters.detach().clone())
        ours, theirs = make(adapters), other([twin])
        for step in range(5):
            gradient = torch.randn(twin.shape, generator=torch.Generator().manual_seed(step))
            adapters.gradients.copy_(gradient)
            twin.grad = gradient
            ours.step()
            theirs.step()
        used = [adapters.layer("0").a, adapters.layer("0").b]
        torch.testing.assert_close(adapters.parameters.detach(), twin.detach(), rtol=1e-5, atol=1e-6)
        assert all(part.isfinite().all() for part in used)


# -------------------------------------------------------------------------------------------------------------- refused


def test_what_is_refused_is_named():
    linear = nn.Linear(8, 8)
    cases = [
        (nn.Sequential(nn.Linear(8, 8).double()), {}, "float64"),
        (nn.Sequential(nn.Linear(8, 8, device="meta")), {}, "meta"),
        (nn.Sequential(nn.ReLU()), {}, "no linear layer"),
        (nn.Sequential(linear), {"targets": "other"}, "other"),
        (nn.Sequential(linear), {"rank": 9}, "rank 9"),
        (nn.Sequential(linear), {"base": "numpy"}, "numpy"),
        (nn.MultiheadAttention(8, 2), {}, "MultiheadAttention"),
        (models.llama(), {"targets": "lm_head"}, "embed_tokens"),
    ]
    int8 = nn.Linear(8, 8)
    int8.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    cases.append((nn.Sequential(int8), {}, "quantised"))

    class Linear4bit(nn.Linear):
        pass

    Linear4bit.__module__ = "bitsandbytes.nn.modules"
    cases.append((nn.Sequential(Linear4bit(8, 8)), {}, "bitsandbytes"))

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    cases.append((nn.Sequential(Own(8, 8)), {}, "forward"))
    for model, options, word in cases:
        before = [type(module) for module in model.modules()]
        with pytest.raises(plora.Error, match=word):
            pt.attach(model, **{"rank": 2, **options})
        assert [type(module) for module in model.modules()] == before
        assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    pt.attach(nn.Sequential(linear), 2)
    with pytest.raises(plora.InvalidArgument, match="already"):
        pt.attach(nn.Sequential(linear), 2)


def test_bad_use_raises_and_never_crashes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapters = pt.attach(model, 2)
    optimizer = pt.AdamW(adapters)
    for x, kind in ((torch.zeros(3, 7), ValueError), (torch.zeros(3, 8).double(), ValueError), (torch.zeros(3, 8, device="meta"), ValueError)):
        with pytest.raises(kind):
            model(x)
    for how in (copy.deepcopy, pickle.dumps):
        for thing in (model, adapters, optimizer):
            with pytest.raises(TypeError, match="cannot be pickled or copied"):
                how(thing)
    y = model(torch.ones(3, 8)).sum()
    adapters.gradients.fill_(1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="between forward and backward"):
        y.backward()
    adapters.gradients.fill_(float("nan"))
    before = adapters.digest()
    with pytest.raises(plora.NonFinite):
        optimizer.step()
    assert adapters.digest() == before
    model[1].weight.data = model[1].weight.data.clone()
    with pytest.raises(plora.Error, match="moved or replaced"):
        model(torch.ones(3, 8))
    parameters, gradients = adapters.parameters, adapters.gradients
    adapters.detach()
    for call in (optimizer.step, adapters.digest, adapters.unload, lambda: adapters.layer("0"), lambda: pt.AdamW(adapters)):
        with pytest.raises(plora.Error, match="detached"):
            call()
    adapters = optimizer = model = y = call = None  # noqa: F841
    gc.collect()
    gradients += parameters.detach()


def test_attach_and_detach_do_not_leak():
    model = nn.Sequential(nn.Linear(64, 64))
    import weakref

    kept = []
    for _ in range(20):
        adapters = pt.attach(model, 4)
        optimizer = pt.AdamW(adapters)
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        adapters.unload(optimizer)
        adapters.detach()
        kept.append(weakref.ref(adapters.core._owner))
        del adapters, optimizer
    gc.collect()
    assert not any(ref() for ref in kept)


def test_one_openmp_pool():
    """Whatever is imported first, the process has one libgomp: two pools would spin against each other."""
    for order in ("import plora.torch", "import plora, plora.torch", "import torch, plora.torch"):
        code = f"{order}\nprint(len({{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}}))"
        package = os.path.dirname(os.path.dirname(plora.__file__))
        result = subprocess.run([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=package), text=True, capture_output=True)
        assert result.stdout.strip() == "1", (order, result.stdout, result.stderr)
