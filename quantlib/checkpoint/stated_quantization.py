"""What config.json says of how weights are quantized, and the digest by which a plan knows a config.json."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SECTIONS = ("quantization_config", "compression_config")


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json, or its text part, says of quantization; empty where it says nothing."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        for section in _SECTIONS:
            if isinstance(values.get(section), Mapping) and values[section]:
                return {"quant_method": _default_method(section), **values[section]}
    return {}


def _default_method(section: str) -> str | None:
    return "compressed-tensors" if section == "compression_config" else None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what it says of that."""
    return {
        name: without_quantization(value) if name == "text_config" and isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _SECTIONS
    }


def config_digest(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """sha256 of a configuration.

    Args:
        config: What a source means; see `quantlib.checkpoint.index.Checkpoint`.
        quantization: What was taken out of it.
    """
    values = {**config, "quantization_config": quantization} if quantization else config
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
