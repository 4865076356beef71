"""A weight of 4 bits, an adapter that trains on it, and others that are served from it in one batch; numpy alone.

    pip install bindings/python numpy
    python examples/python/serve_many.py
"""

import numpy

import plora

K, N, RANK, STEPS = 256, 192, 8, 200


def main():
    random = numpy.random.default_rng(0)
    weight = plora.Quantised.of(random.standard_normal((N, K)).astype("f") / K**0.5, "nf4", nested=True)
    model = plora.Model()
    layer = model.add_quantised("layer", weight, master="memory")  # unloads add to the master, and make the codes from it

    # Train towards a target of rank 24 with adapters of rank 8: every unload frees the next 8.
    target = weight.dequantise() + 0.01 * random.standard_normal((N, 24)).astype("f") @ random.standard_normal((24, K)).astype("f")
    adapters = plora.Adapters(model, rank=RANK, alpha=2.0 * RANK)
    optimizer = plora.Optimizer(adapters, lr=5e-3, schedule="cosine", period=STEPS)
    registry, losses = plora.Registry(model), []
    for step in range(1, 4 * STEPS + 1):
        x = random.standard_normal((64, K)).astype("f")
        y = adapters.forward(layer, x, numpy.empty((64, N), "f"))
        error = y - x @ target.T
        losses.append(float((error**2).mean()))
        adapters.backward(layer, x, error / error.size)
        optimizer.step()
        optimizer.zero_gradients()
        if step % STEPS == 0:
            print(f"step {step}: loss {losses[-1]:.4f} ({losses[0]:.4f} at first); {adapters.unload(optimizer)}")

    # Serve the live adapter and one from elsewhere, mixed with tokens of the backbone alone.
    registry.publish("trained", adapters)
    registry.add("constant", {layer: (numpy.full((1, K), 1.0 / K, "f"), numpy.ones((N, 1), "f"), 1.0)})
    batch, x, y = plora.Batch(model, max_tokens=3), numpy.ones((3, K), "f"), numpy.empty((3, N), "f")
    with registry.acquire("trained") as trained, registry.acquire("constant") as constant:
        batch.begin([1, -1, 0], [trained, constant])  # token 0 is constant's, token 1 the backbone's
    batch.forward([layer], x, [y])
    print(f"served {registry.names()}: token 0 less token 1 is {(y[0] - y[1]).mean():.4f}")
    return losses, y


if __name__ == "__main__":
    main()
