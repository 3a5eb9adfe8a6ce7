"""What the tensors of a model are called in a GGUF file, and in which order their rows stand there.

The tables are those of transformers, in the other direction than `quantlib.checkpoint.gguf_files.meaning`
uses them: the name that it would read a parameter from, and the rows that it would put back in order, learnt
by having it process row numbers. Left out: families whose values its processors change (Gemma's norms) and
routed experts, which GGUF stores as one tensor a block.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from quantlib.errors import UnsupportedModelError
from quantlib.model.families import model_class, open_config
from quantlib.model.meta_model import build_meta_model

# model_type of config.json -> the architecture whose graph llama.cpp runs for it.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredName:
    """A tensor in the file.

    Attributes:
        name: There.
        order: int64 [rows]: which row of the file each row of the tensor is; None where they are the same.
    """

    name: str
    order: torch.Tensor | None = None

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its rows as the file has them."""
        if self.order is None:
            return tensor
        rows = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        rows[self.order.to(tensor.device)] = tensor
        return rows

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `stored`."""
        return rows if self.order is None else rows[self.order]


def architecture_of(config: Mapping[str, Any]) -> str:
    """What ``general.architecture`` says of a model.

    Raises:
        UnsupportedModelError: No name for it is known here; names those that are.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"gguf output is written of {', '.join(ARCHITECTURES)} models, found {model_type}; choose another"
            " format",
            model_type=model_type,
        )
    return ARCHITECTURES[model_type]


def stored_names(config: Mapping[str, Any], tensors: Collection[str]) -> dict[str, StoredName]:
    """Tensor of the model -> its place in the file.

    Args:
        config: The values of config.json.
        tensors: Names as in the checkpoint (``model.layers.0.mlp.up_proj.weight``).

    Raises:
        UnsupportedModelError: `architecture_of` refuses it, or a tensor has no place.
    """
    places = all_names(config)
    unknown = next((name for name in tensors if name not in places), None)
    if unknown is not None:
        raise UnsupportedModelError(
            f"GGUF has no name for {unknown} of a {config.get('model_type')} model; choose another format",
            tensor=unknown,
        )
    return {name: places[name] for name in tensors}


def all_names(config: Mapping[str, Any]) -> dict[str, StoredName]:
    """The same of every parameter that has a place.

    Raises:
        UnsupportedModelError: `architecture_of` refuses it.
    """
    architecture = architecture_of(config)
    opened = open_config(config)
    model = build_meta_model(opened, model_class(opened))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(opened.to_dict()))
    names = get_gguf_hf_weights_map(model, processor, model_type=architecture)
    parameters = model.state_dict()
    return {
        name: StoredName(name=stored, order=_order(processor, stored, len(parameters[name])))
        for stored, name in names.items()
        if name in parameters
    }


def _order(processor: TensorProcessor, stored: str, rows: int) -> torch.Tensor | None:
    numbers = np.arange(rows)
    order = np.asarray(processor.process(numbers[:, None], stored).weights)[:, 0]
    return None if np.array_equal(order, numbers) else torch.from_numpy(np.ascontiguousarray(order))
