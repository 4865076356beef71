"""Registry, snapshots and batches from Python: against a naive sum, in any order of ends, from threads."""

import gc
import itertools
import os
import sys
import threading
import time

import numpy
import pytest

import plora
from conftest import ROOT

K, OUT = 24, (11, 24, 13)


def model_of():
    weights = [numpy.random.randn(n, K).astype("f") for n in OUT]
    model = plora.Model()
    for i, weight in enumerate(weights):
        model.add_linear(f"layer{i}", weight, bias=numpy.arange(OUT[i], dtype="f"))
    return model, weights


def factors(rank, layers=(0, 1, 2)):
    return {
        i: (numpy.random.randn(rank, K).astype("f"), numpy.random.randn(OUT[i], rank).astype("f"), 0.5 + i) for i in layers
    }


def expected(weights, adapters, slots, x):
    """x [T,K] in double; adapters: what each slot stands for."""
    result = []
    for i, weight in enumerate(weights):
        y = x.astype("d") @ weight.astype("d").T + numpy.arange(OUT[i])
        for t, slot in enumerate(slots):
            if slot >= 0 and i in adapters[slot]:
                a, b, scale = (part.astype("d") if hasattr(part, "astype") else part for part in adapters[slot][i])
                y[t] += scale * (b @ (a @ x[t].astype("d")))
        result.append(y)
    return result


def outputs(tokens):
    return [numpy.full((tokens, n), numpy.nan, "f") for n in OUT]


def test_mixed_batch():
    model, weights = model_of()
    registry, batch = plora.Registry(model), plora.Batch(model, max_tokens=16, max_adapters=4, max_rank=8)
    adapters = [factors(1), factors(8, (0, 2)), factors(3)]
    versions = [registry.add(f"a{i}", adapter) for i, adapter in enumerate(adapters)]
    assert len(set(versions)) == 3 and len(registry) == 3 and registry.names() == ["a0", "a1", "a2"]
    snapshots = [registry.acquire(f"a{i}") for i in range(3)]
    info = snapshots[1].info
    assert (info.name, info.version, info.rank, info.weights, info.holders) == ("a1", versions[1], 8, 2, 1) and info.bytes > 0
    slots = numpy.array([2, -1, 0, 1, 1, 2, 0, -1, 1])
    x = numpy.random.randn(len(slots), K).astype("f")
    batch.begin(slots, snapshots)
    for y, want in zip(batch.forward([0, 1, 2], x, outputs(len(slots))), expected(weights, adapters, slots, x)):
        numpy.testing.assert_allclose(y, want, rtol=0, atol=1e-4)
    before = [numpy.random.randn(len(slots), n).astype("f") for n in OUT]
    parts = batch.forward([0, 1, 2], x, [y.copy() for y in before], delta_only=True)
    plain = expected(weights, adapters, [-1] * len(slots), x)
    for part, old, base, want in zip(parts, before, plain, expected(weights, adapters, slots, x)):
        numpy.testing.assert_allclose(part, old + (want - base), rtol=0, atol=1e-4)
        assert (part[1] == old[1]).all() and (part[7] == old[7]).all()
    batch.begin([], [])
    assert snapshots[1].info.holders == 1


def test_replace_unload_and_references():
    model, _ = model_of()
    registry = plora.Registry(model)
    first = registry.add("a", {"layer0": factors(2)[0]})
    held = registry.acquire("a")
    second = registry.add("a", factors(4))
    assert second > first and held.info.version == first and registry.acquire("a").info.version == second
    with registry.acquire("a") as snapshot:
        more = snapshot.retain()
        assert more.info.holders == 2
        with pytest.raises(plora.Busy, match="2"):
            registry.unload("a")
    more.close()
    registry.unload("a")
    held.close()
    with pytest.raises(plora.NotFound):
        registry.acquire("a")
    assert registry.statistics()["retired"] == 0 or registry.collect() is None
    registry.add("a", factors(1))
    last = registry.acquire("a")
    registry.unload("a", defer=True)
    assert list(registry) == [] and last.info.version > second


def test_publish_is_a_copy():
    model, weights = model_of()
    adapters = plora.Adapters(model, rank=2, alpha=4.0)
    for layer in adapters.layers():
        adapters.layer(layer).b[:] = numpy.random.randn(OUT[layer], 2)
    parts = [{i: (adapters.layer(i).a.copy(), adapters.layer(i).b.copy(), 2.0) for i in range(3)}]
    registry, batch = plora.Registry(model), plora.Batch(model, max_tokens=4)
    registry.publish("live", adapters)
    adapters.parameters[:] = numpy.nan
    x = numpy.random.randn(3, K).astype("f")
    with registry.acquire("live") as snapshot:
        batch.begin([0, -1, 0], [snapshot])
    for y, want in zip(batch.forward([0, 1, 2], x, outputs(3)), expected(weights, parts, [0, -1, 0], x)):
        numpy.testing.assert_allclose(y, want, rtol=0, atol=1e-4)


def test_files_evict_pin_merge(tmp_path):
    model, weights = model_of()
    adapters = plora.Adapters(model, rank=2)
    adapters.layer(0).b[:] = 1
    adapters.save(tmp_path / "adapter")
    registry = plora.Registry(model, spill_directory=tmp_path)
    registry.load("a", tmp_path / "adapter")
    registry.pin("a")
    with pytest.raises(plora.Busy):
        registry.evict("a")
    registry.pin("a", False)
    registry.evict("a")
    assert registry.statistics()["evicted"] == 1 and next(iter(registry)).bytes == 0
    assert registry.acquire("a").info.bytes > 0
    before = [weight.copy() for weight in weights]
    registry.merge("a")
    assert next(iter(registry)).merged and not (weights[0] == before[0]).all()
    registry.unmerge()
    assert all((now == then).all() for now, then in zip(weights, before))


@pytest.mark.parametrize(
    "what, kind",
    [
        (lambda r, b, s: r.add("", {}), plora.InvalidArgument),
        (lambda r, b, s: r.add("x" * 300, {}), plora.InvalidArgument),
        (lambda r, b, s: r.add("b", {"nowhere": factors(1)[0]}), plora.NotFound),
        (lambda r, b, s: r.add("b", {0: factors(1)[1]}), plora.ShapeMismatch),
        (lambda r, b, s: r.add("b", {0: (numpy.full((1, K), numpy.inf, "f"), numpy.ones((11, 1), "f"), 1.0)}), plora.NonFinite),
        (lambda r, b, s: r.load("a", "/nowhere"), plora.InputOutput),
        (lambda r, b, s: r.acquire("b"), plora.NotFound),
        (lambda r, b, s: r.unmerge(), plora.InvalidArgument),
        (lambda r, b, s: r.evict("a"), plora.Error),
        (lambda r, b, s: b.begin([0] * 9, [s]), plora.InvalidArgument),
        (lambda r, b, s: b.begin([1], [s]), plora.InvalidArgument),
        (lambda r, b, s: b.begin([0.5], [s]), plora.InvalidArgument),
        (lambda r, b, s: b.begin([0], [s, s, s]), plora.InvalidArgument),
        (lambda r, b, s: b.forward([0], numpy.ones((2, K), "f"), [numpy.ones((2, 11), "f")]), plora.ShapeMismatch),
        (lambda r, b, s: b.forward([0, 1], numpy.ones((1, K), "f"), [numpy.ones((1, 11), "f")]), plora.InvalidArgument),
        (lambda r, b, s: b.forward([9], numpy.ones((1, K), "f"), [numpy.ones((1, 11), "f")]), plora.InvalidArgument),
        (lambda r, b, s: b.forward([0], numpy.ones((1, K), "b"), [numpy.ones((1, 11), "f")]), plora.Unsupported),
        (lambda r, b, s: plora.Batch(r.model, max_rank=0), plora.InvalidArgument),
        (lambda r, b, s: plora.Registry(r.model, spill_directory="/nowhere"), plora.InputOutput),
    ],
)
def test_bad_calls_raise(what, kind):
    model, _ = model_of()
    registry, batch = plora.Registry(model), plora.Batch(model, max_tokens=8, max_adapters=2)
    registry.add("a", factors(2))
    snapshot = registry.acquire("a")
    batch.begin([0], [snapshot])
    with pytest.raises(kind):
        what(registry, batch, snapshot)
    assert registry.names() == ["a"] and snapshot.info.holders == 2
    batch.forward([0], numpy.ones((1, K), "f"), [numpy.ones((1, 11), "f")])


def test_any_order_of_ends():
    for order in itertools.permutations(range(5)):
        model, _ = model_of()
        registry, batch = plora.Registry(model), plora.Batch(model, max_tokens=4)
        registry.add("a", factors(2))
        snapshot = registry.acquire("a")
        batch.begin([0], [snapshot])
        registry.merge("a")
        things = [model.context, model, registry, snapshot, batch]
        del model, _, registry, snapshot, batch
        for i in order:
            things[i].close()
            with pytest.raises(plora.Error, match="closed"):
                _ = things[i].handle
        del things


def test_nothing_leaks():
    context = plora.Context()
    start = context.memory()["current_bytes"]
    for _ in range(8):
        model = plora.Model(context)
        model.add_linear("layer", numpy.zeros((64, K), "f"))
        registry, batch = plora.Registry(model), plora.Batch(model, max_tokens=4)
        for _ in range(3):
            registry.add("a", {0: (numpy.ones((2, K), "f"), numpy.ones((64, 2), "f"), 1.0)})
            batch.begin([0], [registry.acquire("a")])
        del model, registry, batch
        gc.collect()
        assert context.memory()["current_bytes"] == start


def test_threads_replace_while_others_serve():
    """Each answer is wholly one version's: A = 1 and B = v, so y - base = v K."""
    model, weights = model_of()
    registry, stop, failures = plora.Registry(model), threading.Event(), []

    def add(value):
        registry.add("a", {0: (numpy.ones((1, K), "f"), numpy.full((OUT[0], 1), value, "f"), 1.0)})

    def serve():
        batch, x = plora.Batch(model, max_tokens=2), numpy.ones((2, K), "f")
        while not stop.is_set():
            with registry.acquire("a") as snapshot:
                batch.begin([0, -1], [snapshot])
            y = batch.forward([0], x, [numpy.zeros((2, OUT[0]), "f")], delta_only=True)[0]
            if not (y[0] == y[0, 0]).all() or y[0, 0] / K != round(y[0, 0] / K) or y[1].any():
                failures.append(y)

    add(1)
    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for value in range(2, 200):
        add(value)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and registry.statistics()["retired"] <= 3


def test_an_object_that_another_thread_closes_ends_after_the_call():
    model, _ = model_of()
    for _ in range(50):
        registry = plora.Registry(model)
        registry.add("a", factors(2))

        def use(registry=registry):
            try:
                while True:
                    registry.acquire("a").close()
            except plora.Error as error:
                assert "closed" in str(error)

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(1e-3)
        registry.close()
        for thread in threads:
            thread.join()


def test_the_interpreters_lock_is_free_during_calls():
    model = plora.Model()
    model.add_linear("layer", numpy.zeros((512, 512), "f"))
    registry, batch = plora.Registry(model), plora.Batch(model, max_tokens=4096)
    registry.add("a", {0: (numpy.zeros((16, 512), "f"), numpy.zeros((512, 16), "f"), 1.0)})
    with registry.acquire("a") as snapshot:
        batch.begin([0] * 4096, [snapshot])
    x, y = numpy.zeros((4096, 512), "f"), numpy.zeros((4096, 512), "f")
    ticks, done = [0], threading.Event()

    def count():
        while not done.is_set():
            ticks[0] += 1
            time.sleep(1e-5)

    thread, interval = threading.Thread(target=count), sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        thread.start()
        before = ticks[0]
        for _ in range(5):
            batch.forward([0], x, [y])
        assert ticks[0] > before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()


def test_the_example_runs():
    import runpy

    losses, y = runpy.run_path(os.path.join(ROOT, "examples", "python", "serve_many.py"))["main"]()
    assert losses[-1] < 0.1 * losses[0]
    numpy.testing.assert_allclose(y[0] - y[1], 1.0, rtol=0, atol=1e-4)
