"""The whole model without its weights: transformers' module tree on the meta device.

Parameters are shapes only, whatever the size of the model. Buffers that no checkpoint stores (rotary
frequencies, embedding scales) are given real values, since the live parts are copies of this tree.
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from quantlib.errors import UnsupportedModelError


def build_meta_model(config: PretrainedConfig, model_class: Any) -> PreTrainedModel:
    """transformers' model of a class and configuration, on meta, in eval mode.

    Attention is sdpa, or eager where the family has no sdpa (soft-capped scores). No code from a model
    repository is run and nothing is downloaded.
    """
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The ordered decoder blocks and their module path (``model.layers``).

    They are the outermost ModuleList of the (text) decoder that is as long as the configuration's
    num_hidden_layers.

    Raises:
        UnsupportedModelError: There is none, or more than one on the same level.
    """
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    start = next((path for path, module in model.named_modules() if module is decoder), "")
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    # A head, too, may be called decoder; then there is no list in it.
    found = [(path, module) for path, module in lists if path.startswith(start)] or lists
    outermost = min((path.count(".") for path, _ in found), default=0)
    found = [(path, module) for path, module in found if path.count(".") == outermost]
    if len(found) == 1:
        return found[0]
    paths = ", ".join(path for path, _ in found) or "none"
    raise UnsupportedModelError(
        f"wanted one list of {wanted} decoder blocks in the model, found {paths}",
        model_type=model.config.model_type,
    )


Buffers = dict[tuple[str, str], torch.Tensor]


def compute_buffers(model: PreTrainedModel) -> Buffers:
    """Real values, on the CPU, of all buffers that no checkpoint stores, by module path and name.

    A model class of transformers has to be able to do that (``_init_weights``), since from_pretrained builds
    on meta too. Asked twice, with other values to start from, it leaves the same ones where it sets them. The
    model keeps its meta buffers; it has to be as transformers built it.

    Raises:
        UnsupportedModelError: A buffer cannot be computed.
    """
    missing = {
        (path, name): buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }
    first, second = _initialized(model, missing, 0), _initialized(model, missing, 1)
    put_buffers_(model, missing)
    for (path, name), buffer in first.items():
        if not torch.equal(buffer, second[path, name]):
            raise UnsupportedModelError(
                f"buffer {path}.{name} is not stored in checkpoints and transformers does not say how to"
                " compute it; the model cannot be built part by part",
                buffer=f"{path}.{name}",
            )
    return first


def put_buffers_(model: nn.Module, buffers: Buffers) -> None:
    """Give modules their buffers."""
    for (path, name), buffer in buffers.items():
        model.get_submodule(path)._buffers[name] = buffer


def _initialized(model: PreTrainedModel, missing: Buffers, start: int) -> Buffers:
    """The buffers as transformers leaves them that were ``start``; a module above theirs may set them."""
    put_buffers_(
        model, {key: torch.full(buffer.shape, start, dtype=buffer.dtype) for key, buffer in missing.items()}
    )
    above: dict[str, None] = {}
    for path, _ in missing:
        parts = path.split(".")
        above |= dict.fromkeys(".".join(parts[:length]) for length in range(len(parts), -1, -1))
    with torch.no_grad():
        for path in above:
            _owner(model, path)._init_weights(model.get_submodule(path))
    return {(path, name): model.get_submodule(path).get_buffer(name) for path, name in missing}


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model class around a module: it knows how to initialise it."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if isinstance(module, PreTrainedModel):
            return module
    return model
