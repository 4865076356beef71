# SPDX-License-Identifier: Apache-2.0
"""One fine-tuning run of a small model, by one method. The adapters, their optimizer and the unload are the library's.

    lora       one adapter, one cosine over all steps
    restarts   the same, but optimizer and schedule restart every `period` steps, and nothing is unloaded
    plora      unload every `period` steps: m = 1, fresh A, B = 0, optimizer and schedule restart
    momentum   unload of the share m < 1 every `period` steps: the function stays; one cosine over all steps unless the moments
               are reset, when the rate is constant
    full       AdamW of torch on the weights of the same layers, one cosine

All of them see the same batches for the same seed. reinit = "gradient" turns A to the gradient after each full unload.
"""

import math
import os
import resource
import time

import models
import numpy as np
import torch
from corpus import Task
from plan import DEFAULTS

THIN = 50  # steps whose mean train loss is one point of the curve
EVALUATIONS = 10
LAST = 200  # steps whose mean is the final train loss
SPECTRUM = 32


class Diverged(Exception):
    pass


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------------------------------------------------- methods


class Full:
    def __init__(self, model, settings):
        weights = [layer.weight for layer in models.linear_layers(model).values()]
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(weights, settings["lr"], weight_decay=0.0, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: models.cosine(step, settings["steps"], settings["warmup"]))  # fmt: skip
        self.trained = sum(weight.numel() for weight in weights)

    def step(self, step):
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def memory(self):
        return self.trained * 4 * 3  # gradient and two moments

    def live(self, name):
        return 0.0


class LowRank:
    """plora.torch, and what the methods do every `period` steps."""

    def __init__(self, model, settings, probe):
        import plora.torch as plora

        self.settings, self.probe, self.model = settings, probe, model
        method, period = settings["method"], settings["period"]
        residual = {"nearest": "none", "stochastic": "none"}.get(settings["rounding"], "default")
        self.adapters = plora.attach(model, rank=settings["rank"], alpha=settings["rank"], seed=settings["seed"], residual=residual)
        restarts = method in ("plora", "restarts")
        constant = method == "momentum" and settings["moments"] == "reset"
        self.optimizer = plora.AdamW(
            self.adapters, lr=settings["lr"], b_ratio=settings["b_ratio"], warmup=settings["warmup"],
            schedule="constant" if constant else "cosine", period=period if restarts else settings["steps"])  # fmt: skip
        self.trained = self.adapters.parameters.numel()
        self.wanted = {name: 0.0 for name in self.adapters.layers}  # sum of m s B A
        self.reports, self.watched = [], []
        self.align()

    def product(self, name):
        layer = self.adapters.layer(name)
        return layer.scale * (layer.b @ layer.a)

    live = product

    def step(self, step):
        self.optimizer.step()
        self.optimizer.zero_grad()
        settings, done = self.settings, step + 1
        if not settings["period"] or done % settings["period"] or done == settings["steps"]:
            return
        if settings["method"] == "restarts":
            self.optimizer.reset()
        else:
            self.unload(done)

    def unload(self, done):
        settings = self.settings
        momentum = settings["momentum"]
        watch = settings["watch"] and done % settings["watch"] == 0
        before = self.probe() if watch else None
        bf16 = settings["dtype"] == "bf16"
        if bf16:
            for name in self.wanted:
                self.wanted[name] = self.wanted[name] + momentum * self.product(name)
        rounding = settings["rounding"] if bf16 else "default"
        report = self.adapters.unload(
            self.optimizer, momentum=momentum, moments=settings["moments"], rounding=rounding, report=momentum == 1.0)  # fmt: skip
        if report is not None:
            self.reports.append([done, report.captured, report.update_rms / report.weight_rms, self.memory()])
        if watch:
            self.watched.append([done, before, self.probe()])
        self.align()

    def align(self):
        """reinit "gradient": the rows of A span the strongest directions of dL/dW, at the length that the library gave them.

        Two batches of probing with LoRA's own products: with A random, dL/dB = s dW A^T; with B = qr(that) and A = 0,
        dL/dA = s B^T dW, whose right singular vectors are taken. BA = 0 in both, so the function does not change.
        """
        if self.settings["reinit"] != "gradient":
            return
        layers = [self.adapters.layer(name) for name in self.adapters.layers]
        self.probe(gradient=True)
        lengths = [layer.a.norm() for layer in layers]
        for layer in layers:
            layer.b.copy_(torch.linalg.qr(layer.b_gradient)[0])
            layer.a.zero_()
        self.optimizer.zero_grad()
        self.probe(gradient=True)
        for layer, length in zip(layers, lengths):
            rows = torch.linalg.svd(layer.a_gradient, full_matrices=False)[2]
            layer.a.copy_(rows * (length / rows.norm()))
            layer.b.zero_()
        self.optimizer.zero_grad()

    def memory(self):
        return self.adapters.memory()["current_bytes"]


# ----------------------------------------------------------------------------------------------------------- measuring


def spectrum_of(update):
    values = torch.linalg.svdvals(update.double())
    power = values**2
    total = float(power.sum())
    if not total > 0.0:
        return {"rank": 0, "effective": 0.0, "values": []}
    return {
        "rank": int((values > 0.01 * values[0]).sum()), "effective": total**2 / float((power**2).sum()),
        "values": [float(f"{value:.4g}") for value in values[:SPECTRUM]],
    }  # fmt: skip


def update_of(model, before, method):
    """Rank, effective rank and size of W after - W before, the live adapter included, and what bf16 weights hold of it."""
    layers = models.linear_layers(model)
    each, captured = [], []
    for name, start in before.items():
        weight = layers[name].weight.detach().float()
        swapped = type(layers[name]).__name__ == "Conv1D"
        merged = (weight - start).T if swapped else weight - start
        update = merged + method.live(name)
        each.append((spectrum_of(update), float(update.norm() / start.norm())))
        wanted = getattr(method, "wanted", {}).get(name, 0.0)
        if isinstance(wanted, torch.Tensor):
            captured.append(float((merged * wanted).sum() / (wanted * wanted).sum()))
    shown = list(before)[-1]
    return {
        "layer": shown, "spectrum": each[-1][0]["values"], "rank": float(np.mean([part["rank"] for part, _ in each])),
        "effective": float(np.mean([part["effective"] for part, _ in each])),
        "relative": float(np.mean([size for _, size in each])),
        "captured": float(np.mean(captured)) if captured else None,
    }  # fmt: skip


def run(settings, build):
    """The record of a run, but for its key: JSON values only."""
    settings = {**DEFAULTS, **settings}
    torch.set_num_threads(1)
    model, base_loss = models.pretrained(settings["model"], build)
    base = models.digest(model)
    task = Task(settings["task"], build, settings["seed"])
    probes = Task(settings["task"], build, settings["seed"] + 1000)  # other batches than those of training
    if settings["dtype"] == "bf16":
        model = model.to(torch.bfloat16)
    started, cpu = time.time(), time.process_time()

    def probe(gradient=False):
        if gradient:
            models.losses(model, *probes.batch(8 * models.BATCH))[0].backward()
            return None
        return models.evaluate(model, task, "test")

    before = {name: layer.weight.detach().float().clone() for name, layer in models.linear_layers(model).items()}
    method = Full(model, settings) if settings["method"] == "full" else LowRank(model, settings, probe)
    steps = settings["steps"]
    held_out, train, thin, recent, diverged = [], [], [], [], None

    def measure(step):
        tune = models.evaluate(model, task, "tune")[0] if step == steps else None
        test, exact = models.evaluate(model, task, "test")
        held_out.append([step, tune, test, exact, method.memory(), resident()])

    measure(0)
    for step in range(steps):
        loss = models.losses(model, *task.batch(models.BATCH))[0]
        value = float(loss.detach())
        if not math.isfinite(value) or value > 20.0:
            diverged = step
            break
        loss.backward()
        try:
            method.step(step)
        except ArithmeticError:  # the library refuses gradients that are not finite
            diverged = step
            break
        thin.append(value)
        recent = (recent + [value])[-LAST:]
        if len(thin) == THIN:
            train.append(round(float(np.mean(thin)), 5))
            thin = []
        if (step + 1) % (steps // EVALUATIONS) == 0:
            measure(step + 1)
    record = {
        "settings": settings, "base": base, "base_loss": base_loss, "diverged": diverged, "trained": method.trained,
        "train": train, "held_out": held_out, "train_loss": float(np.mean(recent)) if recent and diverged is None else None,
        "tune_loss": held_out[-1][1] if diverged is None else None, "test_loss": held_out[-1][2] if diverged is None else None,
        "exact": held_out[-1][3], "update": update_of(model, before, method) if diverged is None else None,
        "unloads": getattr(method, "reports", []), "watched": getattr(method, "watched", []),
        "seconds": round(time.time() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    return record
