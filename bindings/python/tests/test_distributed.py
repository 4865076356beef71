"""Two gloo processes: data parallel by one all-reduce, DDP as it is, and unloads of weights of which each holds a part."""

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
