#!/usr/bin/env python3
"""The GGUF exports against llama.cpp itself, in fp32.

    llama.py OUTPUT          needs llama-cpp-python, gguf: `make interop`; OUTPUT is as export.py left it

The original and the merged weights become GGUF models here, by gguf-py's names and the row order of llama.cpp's converter.
llama.cpp with the original model and an exported adapter must have the logits that transformers found for the merged one.
"""
import ctypes
import json
import pathlib
import sys

import gguf
import llama_cpp.llama_cpp as llama
import numpy
from safetensors import safe_open

failures = []


def check(what, error, bound):
    good = error <= bound  # false for NaN
    print(f"{'ok    ' if good else 'FAILED'}  {what}: {error:.3g}, at most {bound:.3g}", flush=True)
    if not good:
        failures.append(what)


def interleave(weight, heads):
    """Rows of a head: [first half, second half] -> pairs."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def convert(config, source, target):
    """A Hugging Face LLaMA in fp32 -> GGUF without a tokenizer."""
    writer = gguf.GGUFWriter(target, "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    with safe_open(source, "np") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if name.endswith("q_proj.weight"):
                tensor = interleave(tensor, heads)
            if name.endswith("k_proj.weight"):
                tensor = interleave(tensor, kv_heads)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numpy.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(path, ids, adapter=None):
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 256, 256, 256
    options.type_k = options.type_v = gguf.GGMLQuantizationType.F32
    options.flash_attn_type = 0
    context = llama.llama_init_from_model(model, options)
    if adapter is not None:
        loaded = llama.llama_adapter_lora_init(model, str(adapter).encode())
        assert loaded, f"llama.cpp does not read {adapter}"
        assert llama.llama_set_adapters_lora(context, (llama.llama_adapter_lora_p_ctypes * 1)(loaded), 1,
                                             (ctypes.c_float * 1)(1.0)) == 0
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    logits = numpy.stack([numpy.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (vocabulary,)).copy()
                          for i in range(len(ids))])
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits


def main():
    folder = pathlib.Path(sys.argv[1])
    config = json.loads((folder / "base" / "config.json").read_text())
    wanted = numpy.load(folder / "logits.npz")
    ids = [int(token) for token in wanted["ids"][0]]
    silent = llama.llama_log_callback(lambda level, text, user: None)
    llama.llama_log_set(silent, ctypes.c_void_p())
    llama.llama_backend_init()
    for name in ("base", "merged"):
        convert(config, folder / name / "model.safetensors", folder / f"{name}.gguf")
    moved = abs(wanted["merged"] - wanted["base"]).max()
    found = {
        "base": logits_of(folder / "base.gguf", ids),
        "merged": logits_of(folder / "merged.gguf", ids),
        "exact": logits_of(folder / "base.gguf", ids, folder / "exact.gguf"),
        "truncated": logits_of(folder / "base.gguf", ids, folder / "truncated.gguf"),
    }

    def compare(what, a, b):
        check(f"logits: {what}, of what training moved them by", abs(a - b).max() / moved, 2e-4)

    compare("llama.cpp's base against transformers'", found["base"], wanted["base"])
    compare("llama.cpp's merged model against transformers'", found["merged"], wanted["merged"])
    compare("llama.cpp's base + exact adapter against its merged model", found["exact"], found["merged"])
    compare("llama.cpp's base + exact adapter against transformers' merged model", found["exact"], wanted["merged"])
    compare("llama.cpp's base + truncated adapter against transformers' base + its product", found["truncated"], wanted["truncated"])
    sys.exit(1 if failures else 0)


main()
