"""Which models are known to work, and what is refused before anything is built.

Blocks, linears and input groups are found by tracing, so a family needs no code of its own. The table below
lists the families whose result the tests compare with transformers' own forward.
"""

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantlib.errors import CheckpointError, UnsupportedModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")

# Set by some published configs; each would change what a forward keeps or returns.
_IGNORED_KEYS = ("use_cache", "output_hidden_states", "output_attentions", "return_dict")


def open_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration for the values of a ``config.json``.

    Raises:
        UnsupportedModelError: Unknown family, not a causal language model, or already quantized.
        CheckpointError: transformers finds the values invalid.
    """
    _refuse_other_models(config)
    values = {key: copy.deepcopy(value) for key, value in config.items() if key not in _IGNORED_KEYS}
    model_type = values["model_type"]
    try:
        opened = CONFIG_MAPPING[model_type].from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"config.json is not a valid {model_type} configuration: {error}; correct the file",
            model_type=model_type,
        ) from error
    opened.use_cache = False
    _refuse_bidirectional(opened)
    return opened


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
            " (each as a text-only causal language model)",
            model_type=model_type,
        )
    architectures = config.get("architectures") or ()
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise UnsupportedModelError(
            f"the checkpoint holds {', '.join(architectures)}; wanted a causal language model"
            " (an architecture that ends in ForCausalLM)",
            model_type=model_type,
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            "config.json has a quantization_config: the source is quantized already;"
            " start from the original checkpoint",
            model_type=model_type,
        )


def _refuse_bidirectional(config: PretrainedConfig) -> None:
    causal = getattr(config, "is_causal", True) is not False
    if causal and not getattr(config, "use_bidirectional_attention", False):
        return
    raise UnsupportedModelError(
        "config.json asks for bidirectional attention (is_causal or use_bidirectional_attention);"
        " wanted a causal language model",
        model_type=config.model_type,
    )
