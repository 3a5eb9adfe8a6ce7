"""Writes small checkpoints with json and struct alone: independent of the code under test."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
# (dtype, values): BF16 values are given as their 16-bit patterns.
Tensor = tuple[str, np.ndarray]


def shard_content(
    tensors: Mapping[str, Tensor], *, header: Mapping[str, object] | bytes | None = None
) -> bytes:
    """The bytes of a safetensors file; ``header`` replaces the right one (JSON values, or raw bytes)."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, (dtype, values) in tensors.items():
        begin = len(content)
        content += np.ascontiguousarray(values, dtype=DTYPES[dtype]).tobytes()
        entries[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [begin, len(content)],
        }
    text = header if isinstance(header, bytes) else json.dumps(entries if header is None else header).encode()
    return struct.pack("<Q", len(text)) + text + content


def small_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Tensors named and shaped like a two-block Llama of width 8, with a scalar and an empty tensor."""
    random = np.random.default_rng(seed)

    def bits(*shape: int) -> Tensor:
        # The upper halves of fp32 values near 1 are sound bf16 values.
        values = random.standard_normal(shape).astype(np.float32)
        return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)

    tensors = {"model.embed_tokens.weight": bits(10, 8)}
    for block in range(2):
        prefix = f"model.layers.{block}"
        tensors[f"{prefix}.input_layernorm.weight"] = bits(8)
        tensors[f"{prefix}.mlp.down_proj.weight"] = bits(8, 16)
        tensors[f"{prefix}.mlp.up_proj.weight"] = bits(16, 8)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = bits(8, 8)
    tensors["model.norm.weight"] = "F32", random.standard_normal(8).astype(np.float32)
    tensors["model.scalar"] = "F32", np.array(3.5, dtype=np.float32)
    tensors["model.nothing"] = "F16", np.zeros((0, 4), dtype=np.float16)
    return tensors


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    num_shards: int = 3,
    config: Mapping[str, object] | None = None,
) -> dict[str, Tensor]:
    """Write a valid checkpoint: several shards with an index, or one file without. Returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(small_tensors() if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    names = list(tensors)
    if num_shards == 1:
        (folder / "model.safetensors").write_bytes(shard_content(tensors))
        return tensors
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        shard = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[index * len(names) // num_shards : (index + 1) * len(names) // num_shards]
        (folder / shard).write_bytes(shard_content({name: tensors[name] for name in part}))
        weight_map.update(dict.fromkeys(part, shard))
    write_index(folder, weight_map, tensors)
    return tensors


def write_index(folder: Path, weight_map: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write model.safetensors.index.json."""
    total = sum(np.dtype(DTYPES[dtype]).itemsize * values.size for dtype, values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
