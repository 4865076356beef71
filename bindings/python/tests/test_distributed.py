"""Two gloo processes: data parallel by one all-reduce, DDP as it is, and weights of which each holds a part: by hand, as DTensors of
tensor parallelism, and by FSDP2. The measure is one process with the whole."""

import os
import socket
import time

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import models
import plora.torch as pt

STEPS, PERIOD = 6, 3


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def begin(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(100 + rank)  # nothing may depend on torch's own generator


def run_two(function, *arguments):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    port = free_port()
    processes = [context.Process(target=function, args=(rank, port, queue, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(received(queue, processes) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return results[0], results[1]


def received(queue, processes):
    """The next result; fails where a process ends without one instead of waiting for ever."""
    for _ in range(1200):
        if not queue.empty():
            return queue.get()
        assert all(process.exitcode in (None, 0) for process in processes), "a process failed"
        time.sleep(0.1)
    for process in processes:
        process.kill()
    raise AssertionError("no result within two minutes")


def steps_of(model, adapters, part, reduce):
    optimizer = pt.AdamW(adapters, lr=1e-2)
    for step in range(STEPS):
        models.loss_of(model, models.batch(step, rows=4)[part]).backward()
        reduce()
        optimizer.step()
        optimizer.zero_grad()
        if step % PERIOD == PERIOD - 1:
            adapters.unload(optimizer)


def data_parallel(rank, port, queue, wrap):
    begin(rank, port)
    model = models.llama()
    adapters = pt.attach(model, 4, seed=7)
    part = slice(2 * rank, 2 * rank + 2)

    def average():
        distributed.all_reduce(adapters.gradients)
        adapters.gradients.div_(2)

    if wrap:
        steps_of(nn.parallel.DistributedDataParallel(model), adapters, part, lambda: None)
    else:
        steps_of(model, adapters, part, average)
    weights = {name: value.detach().numpy().copy() for name, value in model.named_parameters() if "plora" not in name}
    queue.put((rank, (adapters.digest(), weights)))
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [False, True], ids=["all-reduce", "DDP"])
def test_data_parallel(wrap):
    first, second = run_two(data_parallel, wrap)
    assert first[0] == second[0]
    model = models.llama()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapters = pt.attach(model, 4, seed=7)
    steps_of(model, adapters, slice(0, 4), lambda: None)
    for name, value in model.named_parameters():
        if "plora" not in name:
            error = (torch.from_numpy(first[1][name]) - value).norm()
            assert not error > 2e-3 * (value - start[name]).norm() + 1e-7, (name, error)


def sharded(rank, port, queue):
    """A two-layer network: the first layer's rows and the second's columns are shared out, as tensor parallelism does."""
    begin(rank, port)
    first, second, x = whole()
    half = slice(8 * rank, 8 * rank + 8)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))
    model[0].weight.data.copy_(first[half])
    model[2].weight.data.copy_(second[:, half])
    adapters = pt.attach(model, 3)
    fill(adapters, half)
    y = model(x)
    distributed.all_reduce(y)
    report = adapters.unload()
    again = model(x)
    distributed.all_reduce(again)
    queue.put((rank, (model[0].weight.numpy(), model[2].weight.numpy(), y.detach().numpy(), again.detach().numpy(), report.captured)))
    distributed.destroy_process_group()


def whole():
    generator = torch.Generator().manual_seed(11)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((16, 12), (6, 16), (5, 12)))


def fill(adapters, half):
    """The same A and B on every rank; of the first layer rows of B, of the second columns of A belong to a shard."""
    generator = torch.Generator().manual_seed(12)
    a0, b0, a2, b2 = (0.3 * torch.randn(*s, generator=generator) for s in ((3, 12), (16, 3), (3, 16), (6, 3)))
    adapters.layer("0").a.copy_(a0)
    adapters.layer("0").b.copy_(b0[half])
    adapters.layer("2").a.copy_(a2[:, half])
    adapters.layer("2").b.copy_(b2)


def sharded_no_grad(*arguments):
    with torch.no_grad():
        sharded(*arguments)


def test_unload_is_local_to_a_shard():
    parts = run_two(sharded_no_grad)
    first, second, x = whole()
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))
    model[0].weight.data.copy_(first)
    model[2].weight.data.copy_(second)
    adapters = pt.attach(model, 3)
    fill(adapters, slice(None))
    with torch.no_grad():
        y = model(x).clone()
    adapters.unload()
    torch.testing.assert_close(torch.cat([torch.from_numpy(p[0]) for p in parts], 0), model[0].weight.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([torch.from_numpy(p[1]) for p in parts], 1), model[2].weight.detach(), rtol=1e-6, atol=1e-6)
    for part in parts:
        torch.testing.assert_close(torch.from_numpy(part[2]), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(part[3]), y, rtol=1e-5, atol=1e-5)
        assert part[4] > 0.999


# ----------------------------------------------------------------------------------------------------- tensor parallel


def network(hidden, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, 6)).to(dtype)


def parallelize(model):
    """The first layer's rows and the second's columns, with a DTensor between them, which may be cut unevenly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})
    return mesh


def train_network(model, adapters, clip, optimizer="plora"):
    """Losses and gradient norms of some steps with dropout, two micro-batches each, and an unload on the way."""
    generator = torch.Generator().manual_seed(5)
    optimizer = pt.AdamW(adapters, lr=1e-2, clip=clip) if optimizer == "plora" else torch.optim.AdamW([adapters.parameters], lr=1e-2)
    seen = []
    model.train()
    for step in range(STEPS):
        for _ in range(2):
            x, want = torch.randn(5, 12, generator=generator), torch.randn(5, 6, generator=generator)
            loss = (model(x) - want).square().mean()
            loss.backward()
            seen.append(loss.item())
        adapters.reduce_gradients()
        seen.append(adapters.gradient_norm())
        if isinstance(optimizer, pt.AdamW):
            optimizer.step(report=True)
            seen.append(optimizer.last_step.gradient_norm)
        else:
            optimizer.step()
        optimizer.zero_grad()
        if step == PERIOD - 1:
            adapters.unload(optimizer)
    return seen


def try_network(model, adapters, clip, optimizer):
    """An input with its gradient, what comes out of it without adapters, and what training has seen."""
    x = torch.linspace(-1, 1, 24).reshape(2, 12).requires_grad_()
    model(x).sum().backward()
    with adapters.disabled():
        plain = model(x).detach()
    adapters.parameters.grad = None
    return x, plain, train_network(model, adapters, clip, optimizer)


def tensor_parallel(rank, port, queue, hidden, clip, optimizer):
    begin(rank, port)
    model = network(hidden)
    parallelize(model)
    adapters = pt.attach(model, 4, seed=9, dropout=0.3)
    fresh = [adapters.layer(name).a.clone() for name in ("0", "2")]
    x, plain, seen = try_network(model, adapters, clip, optimizer)
    weights = [model[i].weight.full_tensor().detach() for i in (0, 2)]
    factors = [(adapters.layer(name).a.clone(), adapters.layer(name).b.clone()) for name in ("0", "2")]
    adapters.detach()
    detached = model(x).detach()
    queue.put((rank, pickled((fresh, x.grad, plain, seen, weights, factors, detached))))
    distributed.destroy_process_group()


def pickled(value):
    """Tensors as numpy arrays, which outlive the process that sent them."""
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().copy()
    return type(value)(pickled(part) for part in value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(("hidden", "clip", "optimizer"), [(16, 0.0, "plora"), (17, 0.05, "plora"), (17, 0.0, "torch")])
def test_tensor_parallel(hidden, clip, optimizer):
    parts = run_two(tensor_parallel, hidden, clip, optimizer)
    model = network(hidden)
    start = [model[i].weight.detach().clone() for i in (0, 2)]
    adapters = pt.attach(model, 4, seed=9, dropout=0.3)
    first, second = (adapters.layer(name).a.clone() for name in ("0", "2"))
    x, plain, seen = try_network(model, adapters, clip, optimizer)
    cut = -(-hidden // 2)
    halves = slice(0, cut), slice(cut, hidden)
    for half, (fresh, dx, plain_there, seen_there, weights, factors, _) in zip(halves, parts):
        assert torch.equal(torch.from_numpy(fresh[0]), first)  # A of a row shard is the whole one's
        assert torch.equal(torch.from_numpy(fresh[1]), second[:, half])  # and of a column shard its columns
        torch.testing.assert_close(torch.from_numpy(dx), x.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(plain_there), plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(seen_there), torch.tensor(seen), rtol=1e-4, atol=1e-5)
        for before, there, i in zip(start, weights, (0, 2)):
            moved = (model[i].weight - before).norm()
            assert moved > 1e-3
            assert not (torch.from_numpy(there) - model[i].weight).norm() > 2e-3 * moved
        for (a, b), name, rows in zip(factors, ("0", "2"), (True, False)):
            whole = adapters.layer(name)
            want_a, want_b = (whole.a, whole.b[half]) if rows else (whole.a[:, half], whole.b)
            assert not (torch.from_numpy(a) - want_a).norm() > 2e-3 * want_a.norm()
            assert not (torch.from_numpy(b) - want_b).norm() > 5e-3 * want_b.norm()
    assert (parts[0][5][0][0] == parts[1][5][0][0]).all()  # what is replicated is so to the bit: A of the first layer
    assert (parts[0][5][1][1] == parts[1][5][1][1]).all()  # and B of the second
    adapters.detach()
    for part in parts:
        torch.testing.assert_close(torch.from_numpy(part[6]), model(x).detach(), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- FSDP2


def fully_sharded(model, each_layer):
    from torch.distributed.fsdp import fully_shard

    if each_layer:
        for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
            fully_shard(layer)
    return fully_shard(model)


def fill_b(adapters):
    """An adapter that does something, after an unload has taken the last one."""
    for name in adapters.layers:
        adapters.layer(name).b.fill_(0.01)


def fsdp(rank, port, queue, family, each_layer):
    begin(rank, port)
    model = fully_sharded(models.FAMILIES[family](), each_layer)
    adapters = pt.attach(model, 4, seed=7)
    fresh = adapters.parameters.detach().clone()
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "plora" not in name)
    steps_of(model, adapters, slice(2 * rank, 2 * rank + 2), adapters.reduce_gradients)
    with torch.no_grad():  # after which the root's weights stay gathered
        fill_b(adapters)
        before = model(input_ids=models.batch(9)).logits.clone()
        report = adapters.unload(momentum=0.5)
        after = model(input_ids=models.batch(9)).logits.clone()
    state = adapters.state_dict()
    adapters.load_state_dict(state)
    digest = adapters.digest(), adapters.digest(weights=False)
    weights = {name: value.full_tensor().detach().numpy().copy() for name, value in model.named_parameters() if "plora" not in name}
    adapters.detach()
    plain = model(input_ids=models.batch(9)).logits.detach()
    queue.put((rank, pickled((fresh, digest, list(weights.items()), before, after, report.captured, plain))))
    distributed.destroy_process_group()


@pytest.mark.parametrize(("family", "each_layer"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_fsdp(family, each_layer):
    parts = run_two(fsdp, family, each_layer)
    model = models.FAMILIES[family]()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapters = pt.attach(model, 4, seed=7)
    fresh = adapters.parameters.detach().clone()
    steps_of(model, adapters, slice(0, 4), lambda: None)
    with torch.no_grad():
        fill_b(adapters)
        before = model(input_ids=models.batch(9)).logits.clone()
    adapters.unload(momentum=0.5)
    assert parts[0][1][1] == parts[1][1][1]
    assert parts[0][1][0] != parts[1][1][0]
    for fresh_there, _, weights, before_there, after_there, captured, _ in parts:
        assert torch.equal(torch.from_numpy(fresh_there), fresh)
        assert captured > 0.999
        torch.testing.assert_close(torch.from_numpy(before_there), before, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(after_there), torch.from_numpy(before_there), rtol=1e-4, atol=1e-5)
        weights = dict(weights)
        moved = 0
        for name, value in model.named_parameters():
            if "plora" in name:
                continue
            error, change = (torch.from_numpy(weights[name]) - value).norm(), (value - start[name]).norm()
            assert not error > 3e-3 * change + 1e-7, (name, error)
            moved += int(change > 1e-4)
        assert moved == len(adapters.layers)
    adapters.detach()
    for part in parts:
        torch.testing.assert_close(torch.from_numpy(part[6]), model(input_ids=models.batch(9)).logits.detach(), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- bits


def random_factors(adapters, place):
    """The same A and B on all ranks, each cut to what a rank has. place: (rows, columns) of each layer."""
    generator = torch.Generator().manual_seed(21)
    for name, (n, k), (rows, columns) in zip(("0", "2"), ((17, 12), (6, 17)), place):
        a, b = torch.randn(4, k, generator=generator), torch.randn(n, 4, generator=generator)
        adapters.layer(name).a.copy_(a[:, columns])
        adapters.layer(name).b.copy_(b[rows])


EVERYTHING = slice(None), slice(None)


def bits(rank, port, queue, kind):
    begin(rank, port)
    model = network(17, torch.bfloat16)
    half = slice(9 * rank, 9 + 8 * rank)
    place = EVERYTHING, EVERYTHING
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        parallelize(model)
        place = (half, slice(None)), (slice(None), half)
    adapters = pt.attach(model, 4, seed=9, residual="none")
    random_factors(adapters, place)
    adapters.unload(rounding="stochastic")
    weights = [model[i].weight.full_tensor().detach() for i in (0, 2)]
    queue.put((rank, pickled([weight.view(torch.int16) for weight in weights])))
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["tensor parallel", "fsdp"])
def test_stochastic_rounding_has_the_bits_of_one_process(kind):
    parts = run_two(bits, kind)
    model = network(17, torch.bfloat16)
    adapters = pt.attach(model, 4, seed=9, residual="none")
    random_factors(adapters, (EVERYTHING, EVERYTHING))
    adapters.unload(rounding="stochastic")
    for part in parts:
        for there, i in zip(part, (0, 2)):
            assert torch.equal(torch.from_numpy(there), model[i].weight.detach().view(torch.int16))


# ------------------------------------------------------------------------------------------------------------- refused


def refusals(rank, port, queue):
    begin(rank, port)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

    found = {}

    def message(what, call):
        try:
            call()
        except pt.Error as error:
            found[what] = f"{type(error).__name__}: {error}"

    mesh = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))

    def placed(shape, mesh, placements):
        model = nn.Sequential(nn.Linear(*shape, bias=False))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, placements))
        return model

    message("two cuts", lambda: pt.attach(placed((8, 8), square, [Shard(0), Shard(1)]), 2))
    message("a mesh of two", lambda: pt.attach(placed((8, 8), square, [Replicate(), Shard(1)]), 2))
    message("replicated", lambda: pt.attach(placed((8, 8), mesh, [Replicate()]), 2))
    message("empty", lambda: pt.attach(fully_shard(nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8))), 1))
    parallel = network(16)
    parallelize(parallel)
    adapters = pt.attach(parallel, 2)
    message("plain x", lambda: parallel[0].forward(torch.zeros(1, 12)))
    message("saved", lambda: adapters.save_pretrained("nowhere"))
    other = nn.Linear(4, 4)
    message("rank", lambda: pt.attach(placed((2, 40), mesh, [Shard(1)]), 3))
    sharded_model = fully_shard(network(16))
    whole = pt.attach(sharded_model, 2)
    message("not gathered", lambda: sharded_model[0](torch.zeros(1, 12)))
    if rank == 1:  # a rank that fails takes the others along
        whole.layer("0").b.fill_(float("nan"))
    message("one rank", lambda: whole.unload())
    whole.layer("0").b.fill_(0.0)
    del other, DTensor, distribute_module
    queue.put((rank, found))
    distributed.destroy_process_group()


def test_refused_by_name():
    for rank, found in enumerate(run_two(refusals)):
        for what, says in {
            "two cuts": "must be cut once",
            "a mesh of two": "a mesh of one dimension",
            "replicated": "it must be Shard(0) or Shard(1)",
            "empty": "some rank would hold none of it",
            "plain x": "its weight is a DTensor, x is a plain tensor",
            "saved": "each rank holds a part of the adapter",
            "rank": "rank 3 exceeds min(K=2, N=40)",
            "not gathered": "is not gathered",
            "one rank": "NonFinite: layer '0': B holds" if rank else "failed on another rank",
        }.items():
            assert says in found.get(what, "nothing"), (what, found.get(what))
