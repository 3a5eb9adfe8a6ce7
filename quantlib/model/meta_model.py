"""The whole model without its weights: transformers' module tree on the meta device.

Parameters are shapes only, whatever the size of the model. Buffers that no checkpoint stores (rotary
frequencies, embedding scales) are given real values, since the live parts are copies of this tree.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from quantlib.errors import UnsupportedModelError


def build_meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """transformers' causal language model for a configuration, on meta, in eval mode.

    Attention is sdpa, or eager where the family has no sdpa (soft-capped scores). No code from a model
    repository is run and nothing is downloaded.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation=attention, dtype=torch.float32
        )
    return model.requires_grad_(False).eval()


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The ordered decoder blocks and their module path (``model.layers``).

    They are the outermost ModuleList of the model that is as long as the configuration's num_hidden_layers.

    Raises:
        UnsupportedModelError: There is none, or more than one on the same level.
    """
    wanted = model.config.num_hidden_layers
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    outermost = min((path.count(".") for path, _ in found), default=0)
    found = [(path, module) for path, module in found if path.count(".") == outermost]
    if len(found) == 1:
        return found[0]
    paths = ", ".join(path for path, _ in found) or "none"
    raise UnsupportedModelError(
        f"wanted one list of {wanted} decoder blocks in the model, found {paths}",
        model_type=model.config.model_type,
    )


def restore_buffers_(model: PreTrainedModel) -> None:
    """Give every buffer that no checkpoint stores its real value, on the CPU.

    A model class of transformers has to be able to do that (``_init_weights``), since from_pretrained builds
    on meta too. NaN marks what it left out.

    Raises:
        UnsupportedModelError: A buffer cannot be restored.
    """
    for path, module in model.named_modules():
        names = sorted(module._non_persistent_buffers_set & module._buffers.keys())
        names = [name for name in names if module._buffers[name] is not None]
        if not names:
            continue
        for name in names:
            module._buffers[name] = _unset_like(module.get_buffer(name), f"{path}.{name}")
        with torch.no_grad():
            _owner(model, path)._init_weights(module)
        for name in names:
            if module.get_buffer(name).isnan().any():
                raise _cannot_restore(f"{path}.{name}")


def _unset_like(buffer: torch.Tensor, name: str) -> torch.Tensor:
    if not buffer.is_floating_point():
        raise _cannot_restore(name)
    return torch.full(buffer.shape, float("nan"), dtype=buffer.dtype)


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model class around a module: it knows how to initialise it."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if isinstance(module, PreTrainedModel):
            return module
    return model


def _cannot_restore(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"buffer {name} is not stored in checkpoints and transformers does not say how to compute it;"
        " the model cannot be built part by part",
        buffer=name,
    )
