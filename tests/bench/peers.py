"""The other side of the benchmark: torch and PEFT, as a server that measures when it is asked to.

bench.py starts one process for each variant (dtype, dtype of the adapters, heap settings in its environment), so that
peak memory belongs to one variant alone and both sides can alternate within one run:

    request    one JSON object a line on stdin, {"op": "train", "steps": 2}
    answer     one JSON object a line on stdout, {"seconds": [...]}; {"error": "..."} ends the variant

What is measured is the best form that we know of: no gradient checkpointing, torch's fused attention (the eager one is
slower, in bf16 many times), its fused optimizer, warmed up. No downloads: the weights are random, their values do not
change the time.
"""

import argparse
import json
import resource
import sys
import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 2  # untimed repeats of each request, as on the other side: caches belong to whoever measured last
LEAST_ROUNDS, BATCH_SECONDS, SLOW_STEP_SECONDS = 3, 20.0, 10.0


def peak_rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Training:
    """LoRA on every linear layer of a LLaMA, batch x tokens random tokens with a label at every position, AdamW."""

    def __init__(self, args):
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        with open(args.config, encoding="utf-8") as file:
            values = json.load(file)
        torch.manual_seed(0)
        dtype = DTYPES[args.dtype]
        self.config = LlamaConfig(**values, attn_implementation=args.attention)
        torch.set_default_dtype(
            dtype
        )  # build in the final dtype: a conversion afterwards would raise the peak memory
        model = LlamaForCausalLM(self.config)
        torch.set_default_dtype(torch.float32)
        model.config.use_cache = False
        self.frozen = args.adapters == "none"
        if args.layers == "plora":
            import plora.torch

            adapters = plora.torch.attach(model, args.rank, 2 * args.rank)
            self.parameters = adapters.parameters.numel()
            self.optimizer = plora.torch.AdamW(adapters, lr=1e-4)
            if args.loss == "plora":
                import plora.transformers

                model.loss_function = plora.transformers.causal_lm_loss
        elif self.frozen:
            model.requires_grad_(False)
            model.enable_input_require_grads()
        else:
            lora = LoraConfig(
                r=args.rank,
                lora_alpha=2 * args.rank,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, lora, autocast_adapter_dtype=args.adapters == "fp32")
            trained = [p for p in model.parameters() if p.requires_grad]
            found = {p.dtype for p in trained}
            if found != {DTYPES[args.adapters]}:
                raise RuntimeError(f"adapters should be {args.adapters}, but are {found}")
            self.parameters = sum(p.numel() for p in trained)
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        model.train()
        self.model = model
        self.tokens = torch.randint(0, self.config.vocab_size, (args.batch, args.tokens))

    def step(self):
        output = self.model(input_ids=self.tokens, labels=self.tokens)
        output.loss.backward()
        if not self.frozen:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(output.loss.detach())

    def train(self, request):
        """Seconds of `steps` steps, or of one that is slow: bf16 where the processor has no such products."""
        seconds, loss = [], 0.0
        while len(seconds) < request["steps"] and not (seconds and seconds[0] > SLOW_STEP_SECONDS):
            begin = time.perf_counter()
            loss = self.step()
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds, "loss": loss, "peak_rss_bytes": peak_rss()}


class Merge:
    """PEFT's merge_adapter on one linear layer, and torch's in-place addmm_ on the same shapes."""

    def __init__(self, args):
        self.made = {}
        self.args = args

    def layer(self, rows, columns, rank, dtype):
        from peft import LoraConfig, get_peft_model

        key = ("merge", rows, columns, rank, dtype)
        if key not in self.made:
            torch.manual_seed(0)
            linear = torch.nn.Linear(columns, rows, bias=False, dtype=DTYPES[dtype])
            lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=False)
            self.made[key] = get_peft_model(torch.nn.Sequential(linear), lora)
        return self.made[key]

    def merge(self, request):
        model = self.layer(request["rows"], request["columns"], request["rank"], request["dtype"])
        seconds = []
        for _ in range(WARM_UP + request["repeats"]):
            begin = time.perf_counter()
            model.merge_adapter()
            seconds.append(time.perf_counter() - begin)
            model.unmerge_adapter()
        return {"seconds": seconds[WARM_UP:], "peak_rss_bytes": peak_rss()}

    def unload(self, request):
        """Ours on the same layer, through plora.torch; B is filled anew each time, as an unload leaves it 0."""
        import plora.torch

        rows, columns, rank, dtype = request["rows"], request["columns"], request["rank"], request["dtype"]
        key = ("unload", rows, columns, rank, dtype)
        if key not in self.made:
            torch.manual_seed(0)
            linear = torch.nn.Linear(columns, rows, bias=False, dtype=DTYPES[dtype])
            self.made[key] = plora.torch.attach(torch.nn.Sequential(linear), rank, 2 * rank, residual="none")
        adapters, seconds = self.made[key], []
        for _ in range(WARM_UP + request["repeats"]):
            adapters.layer("0").b.normal_(std=1e-3)
            begin = time.perf_counter()
            adapters.unload(rounding="nearest", report=False)
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds[WARM_UP:], "peak_rss_bytes": peak_rss()}

    def addmm(self, request):
        rows, columns, rank = request["rows"], request["columns"], request["rank"]
        key = ("addmm", rows, columns, rank, request["dtype"])
        if key not in self.made:
            dtype = DTYPES[request["dtype"]]
            torch.manual_seed(0)
            self.made[key] = (
                torch.randn(rows, columns).mul_(0.02).to(dtype),
                torch.randn(rows, rank).mul_(1e-3).to(dtype),
                torch.randn(rank, columns).mul_(1e-3).to(dtype),
            )
        weight, left, right = self.made[key]
        seconds = []
        with torch.no_grad():
            for _ in range(WARM_UP + request["repeats"]):
                begin = time.perf_counter()
                torch.addmm(weight, left, right, alpha=0.5, out=weight)
                seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds[WARM_UP:]}

    def layer_step(self, request):
        """Forward and backward of one layer with and without PEFT's adapter, on the same input."""
        rows, columns, rank, tokens = request["rows"], request["columns"], request["rank"], request["tokens"]
        dtype = DTYPES[request["dtype"]]
        key = ("layer", rows, columns, rank, tokens, request["dtype"])
        if key not in self.made:
            base = torch.nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
            x = torch.randn(tokens, columns, dtype=dtype, requires_grad=True)
            self.made[key] = (
                base,
                self.layer(rows, columns, rank, request["dtype"]),
                x,
                torch.randn(tokens, rows, dtype=dtype),
            )
        base, model, x, gradient = self.made[key]
        seconds = {"base": [], "adapter": []}
        for _ in range(WARM_UP + request["repeats"]):
            for name, module in (("base", base), ("adapter", model)):
                begin = time.perf_counter()
                module(x).backward(gradient)
                seconds[name].append(time.perf_counter() - begin)
                x.grad = None
                model.zero_grad(set_to_none=True)
        return {name: values[WARM_UP:] for name, values in seconds.items()}

    def batch(self, request):
        """Inference of one layer: the base alone, PEFT's mixed batch (adapter_names), and one call for each adapter.

        A sequence of a mixed batch has one adapter: decode is `tokens` sequences of 1, prefill one sequence for each adapter.
        No round is begun after BATCH_SECONDS, but LEAST_ROUNDS are.
        """
        from peft import LoraConfig, get_peft_model

        rows, columns, rank, tokens = request["rows"], request["columns"], request["rank"], request["tokens"]
        adapters, dtype = request["adapters"], DTYPES[request["dtype"]]
        key = ("batch", rows, columns, rank, tokens, adapters, request["dtype"])
        if key not in self.made:
            base = torch.nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
            own = torch.nn.Linear(columns, rows, bias=False, dtype=dtype)
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=False)
            model = get_peft_model(torch.nn.Sequential(own), config, adapter_name="a0")
            for i in range(1, adapters):
                model.add_adapter(f"a{i}", config)
            model.eval()
            sequences = adapters if request["prefill"] else tokens
            x = torch.randn(sequences, tokens // sequences, columns, dtype=dtype)
            self.made[key] = base, model, x, [f"a{i * adapters // sequences}" for i in range(sequences)]
        base, model, x, names = self.made[key]
        layer, share = model.base_model.model[0], x.shape[0] // adapters

        def each():
            for i in range(adapters):
                layer.set_adapter(f"a{i}")
                layer(x[i * share : (i + 1) * share])

        seconds = {"base": [], "mixed": [], "each": []}
        begun = time.perf_counter()
        with torch.inference_mode():
            for i in range(WARM_UP + request["repeats"]):
                if i >= WARM_UP + LEAST_ROUNDS and time.perf_counter() - begun > BATCH_SECONDS:
                    break
                for name, call in (("base", lambda: base(x)), ("mixed", lambda: layer(x, adapter_names=names)), ("each", each)):
                    begin = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - begin)
        return {name: values[WARM_UP:] for name, values in seconds.items()}

    def clear(self, request):
        self.made.clear()
        return {}


def versions(_):
    config = torch.__config__.show()
    onednn = [line.strip(" -") for line in config.splitlines() if "MKL-DNN" in line or "oneDNN" in line]
    import peft
    import transformers

    return {
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch_onednn": onednn[0] if onednn else "",
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=["train", "merge"])
    parser.add_argument("--config", help="config.json of the model")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--adapters", choices=["fp32", "bf16", "none"], default="fp32")
    parser.add_argument("--layers", choices=["peft", "plora"], default="peft", help="whose adapters")
    parser.add_argument("--loss", choices=["transformers", "plora"], default="transformers", help="whose cross-entropy")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not look like an answer

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        side = Training(args) if args.variant == "train" else Merge(args)
        operations = {"versions": versions, "rss": lambda _: {"peak_rss_bytes": peak_rss()}}
        if args.variant == "train":
            operations["train"] = side.train
        else:
            operations.update(merge=side.merge, unload=side.unload, addmm=side.addmm, layer=side.layer_step, batch=side.batch, clear=side.clear)
        answer({"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            answer(operations[request["op"]](request))
    except Exception as error:  # pylint: disable=broad-exception-caught
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
