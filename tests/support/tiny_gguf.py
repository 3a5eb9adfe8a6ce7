"""Tiny models as GGUF files, written by the gguf package the way llama.cpp converts checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.support.tiny_models import tiny_config, tiny_model

Kind = gguf.GGMLQuantizationType
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}
EXPERTS = {"mlp_only_layers": [], "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}


def tiny_gguf(
    path: Path,
    family: str = "llama",
    *,
    kind_of: Callable[[str], Kind] = lambda _: Kind.F32,
    file_type: int = 0,
    tensors: Mapping[str, np.ndarray] | None = None,
    split: int = 0,
    **overrides: Any,
) -> dict[str, torch.Tensor]:
    """Write a random model; returns its tensors as transformers names them.

    Args:
        path: Of the file; parts are named after it.
        family: Key of `ARCHITECTURES`.
        kind_of: How the matrix of a GGUF name is stored; what the package does not quantize to is stored as
            random codes. Vectors stay in fp32.
        file_type: What the metadata say of that.
        tensors: Further ones.
        split: Tensors in a part; 0 writes one file.
    """
    config = tiny_config(family, **{**SHAPE, **(EXPERTS if "moe" in family else {}), **overrides})
    model = tiny_model(config)
    named = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if not config.get("tie_word_embeddings"):
        named["lm_head.weight"] = model.state_dict()["lm_head.weight"]
    arch = ARCHITECTURES[family]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split)
    _write_settings(writer, model.config, file_type)
    for name, tensor in _apart(named).items():
        base, _, suffix = name.rpartition(".")
        stored = f"{names.get_name(base)}.{suffix}"
        values = _as_llama_cpp(stored, np.ascontiguousarray(tensor.numpy()), family, model.config)
        _add(writer, stored, values, Kind.F32 if values.ndim == 1 else kind_of(stored))
    for stored, values in (tensors or {}).items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _each_expert(named)


def _apart(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gate and up of all experts as two tensors."""
    found = {}
    for name, tensor in named.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            found[f"{prefix}gate_proj.weight"], found[f"{prefix}up_proj.weight"] = tensor.chunk(2, 1)
        else:
            found[f"{name}.weight" if name.endswith("experts.down_proj") else name] = tensor
    return found


def _each_expert(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in _apart(named).items():
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            found |= {f"{before}.experts.{e}.{after}": matrix for e, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def _write_settings(writer: gguf.GGUFWriter, config: Any, file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    if hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    # Byte pairs of a tiny alphabet, enough for a tokenizer with a token of its own for every byte.
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = ["<|endoftext|>", *letters, "th", *(f"<extra{n}>" for n in range(config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens[: config.vocab_size])
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _as_llama_cpp(stored: str, values: np.ndarray, family: str, config: Any) -> np.ndarray:
    """What its converter does: llama's rotary pairs lie side by side, gemma's norms are stored plus one."""
    if family == "llama" and stored.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.num_attention_heads if "attn_q" in stored else config.num_key_value_heads
        paired = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
        return np.ascontiguousarray(paired.reshape(values.shape))
    if "ffn_gate_inp_shexp" in stored:
        return values[0]
    if family == "gemma3_text" and stored.endswith("norm.weight"):
        return values + 1
    return values


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Kind.Q8_0
    if kind == Kind.F32:
        writer.add_tensor(name, values)
        return
    try:
        codes = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*values.shape[:-1], values.shape[-1] // block * size)
        codes = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    writer.add_tensor(name, codes, raw_dtype=kind)
