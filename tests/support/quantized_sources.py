"""Small sources as other tools store them: tensors in two shards, and how they are read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.storage import Store, open_store
from tests.support.tiny_models import read_all_tensors, read_config

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_source(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    quantization: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint whose tensors alternate between two shards, so that parts of a weight lie apart."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map = {name: SHARDS[place % 2] for place, name in enumerate(names)}
    for shard in SHARDS:
        held = {name: tensors[name].contiguous() for name in names if weight_map[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = {"model_type": "llama", "dtype": "bfloat16", **(config or {})}
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": dict(quantization)}))
    return folder


def requantized(
    source: Path, target: Path, stored: Mapping[str, torch.Tensor], quantization: Mapping[str, Any]
) -> Path:
    """A copy of a checkpoint in which stored tensors take the place of the weights they stand for.

    A part of the linear ``m`` is called ``m.`` and anything.
    """
    tensors = read_all_tensors(source)
    replaced = {
        name for name in tensors if any(part.startswith(name.removesuffix("weight")) for part in stored)
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    write_source(target, {**kept, **stored}, quantization, read_config(source))
    for side_file in source.glob("*token*"):
        (target / side_file.name).write_bytes(side_file.read_bytes())
    return target


def opened(folder: Path, **options: Any) -> tuple[Store, Checkpoint]:
    """Its store and what it means."""
    store = open_store("file:///")
    return store, open_source(store, f"file://{folder}", **options)


def read_source(folder: Path, *names: str, **options: Any) -> dict[str, torch.Tensor]:
    """Tensors it means by name; all unless named."""
    store, checkpoint = opened(folder, **options)
    return read_tensors(store, checkpoint, names or list(checkpoint.tensors))


def read_in_short_runs(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """All of them, made as few rows at a time as can be, as if they were long."""
    store, checkpoint = opened(folder, **options)
    return read_tensors(store, with_short_runs(checkpoint), list(checkpoint.tensors))


def with_short_runs(checkpoint: Checkpoint) -> Checkpoint:
    """The same, of which as few rows are made at a time as can be."""
    decoded = {name: dataclasses.replace(made, run_values=1) for name, made in checkpoint.decoded.items()}
    return dataclasses.replace(checkpoint, decoded=decoded)


def captured_tensor(stored: Mapping[str, Any]) -> torch.Tensor:
    """A tensor of a captured file: ``dtype``, ``shape`` and ``bytes`` in hexadecimal."""
    values = torch.frombuffer(bytearray.fromhex(stored["bytes"]), dtype=getattr(torch, stored["dtype"]))
    return values.reshape(stored["shape"])
