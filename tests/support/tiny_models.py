"""Tiny random checkpoints of every tested family, written by transformers, and plain readers for them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.family_settings import FAMILY_SETTINGS, SHAPE

_COMMON = {
    **SHAPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The values of a config.json; ``overrides`` replace single ones."""
    return {"model_type": family, **_COMMON, **FAMILY_SETTINGS[family], **overrides}


def auto_class(config: dict[str, Any]) -> Any:
    """transformers' entrance to a kind of model."""
    return AutoModelForMultimodalLM if "text_config" in config else AutoModelForCausalLM


def tiny_model(config: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """transformers' own model with random weights that are large enough for every part to matter."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(seed)
    model = auto_class(config).from_config(
        CONFIG_MAPPING[config["model_type"]](**values), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # Norm weights stay near their start, biases become non-zero.
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def save_tiny_checkpoint(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "40KB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of several shards with config.json and index; returns the folder."""
    model = tiny_model(tiny_config(family, **overrides), seed=seed).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a checkpoint's config.json."""
    return json.loads((folder / "config.json").read_text())


def read_all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors
