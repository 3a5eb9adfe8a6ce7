"""Which models can be opened, and what is refused before anything is built.

Every causal language model of transformers can: blocks, linears, experts and stored names are found, not
listed. What a family lacks shows when its model is built and traced, and is said there.
"""

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from quantlib.errors import CheckpointError, UnsupportedModelError

# Set by some published configs; each would change what a forward keeps or returns.
_IGNORED_KEYS = ("use_cache", "output_hidden_states", "output_attentions", "return_dict")

# How classes that return the logits of a next token are called, in transformers and in published configs.
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


# How configurations call the number of experts a token is routed to, and parts that may hold it.
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
_PARTS = ("text_config", "ffn_config")


def experts_per_token(config: Mapping[str, Any]) -> int:
    """To how many routed experts a token goes, for estimates; 1 where ``config.json`` does not say.

    >>> experts_per_token({"text_config": {"num_experts_per_tok": 8}}), experts_per_token({})
    (8, 1)
    """
    for values in (config, *(config[part] for part in _PARTS if isinstance(config.get(part), Mapping))):
        found = next((values[key] for key in _EXPERTS_PER_TOKEN if isinstance(values.get(key), int)), None)
        if found is not None:
            return found
    return 1


def open_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration for the values of a ``config.json``.

    Raises:
        UnsupportedModelError: Unknown family, not a causal language model, or already quantized.
        CheckpointError: transformers finds the values invalid.
    """
    _refuse_other_models(config)
    values = {key: copy.deepcopy(value) for key, value in config.items() if key not in _IGNORED_KEYS}
    # Infinity is written as {"__float__": "Infinity"}.
    values = PretrainedConfig._decode_special_floats(values)
    model_type = values["model_type"]
    try:
        opened = CONFIG_MAPPING[model_type].from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"config.json is not a valid {model_type} configuration: {error}; correct the file",
            model_type=model_type,
        ) from error
    for part in (opened, opened.get_text_config(decoder=True)):
        part.use_cache = False
        _refuse_bidirectional(part)
    return opened


def model_class(config: PretrainedConfig) -> Any:
    """transformers' class for a configuration: the one its ``architectures`` names if there are several.

    Raises:
        UnsupportedModelError: There is none that reads text and predicts its next token.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    found: list[Any] = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    found = [inner for entry in found for inner in (entry if isinstance(entry, tuple) else (entry,))]
    text = config.get_text_config(decoder=True)
    # Of a multimodal configuration, a class that reads its text part only is not the one that was stored.
    found = [entry for entry in found if text is config or entry.config_class is not type(text)]
    if not found or config.is_encoder_decoder:
        kind = "an encoder-decoder model" if config.is_encoder_decoder else "no causal language model"
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is {kind} in transformers; wanted a causal language model",
            model_type=config.model_type,
        )
    named = [entry for entry in found if entry.__name__ in (config.architectures or ())]
    return (named or found)[0]


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not one that transformers has; wanted a causal language model"
            " of transformers (no code of a model repository is run)",
            model_type=model_type,
        )
    architectures = config.get("architectures") or ()
    if architectures and not any(name.endswith(_GENERATES) for name in architectures):
        raise UnsupportedModelError(
            f"the checkpoint holds {', '.join(architectures)}; wanted a causal language model"
            f" (an architecture that ends in {', '.join(_GENERATES)})",
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
    # "vision": only among the tokens of an image.
    if causal and getattr(config, "use_bidirectional_attention", False) in (False, None, "vision"):
        return
    raise UnsupportedModelError(
        "config.json asks for bidirectional attention (is_causal or use_bidirectional_attention);"
        " wanted a causal language model",
        model_type=config.model_type,
    )
