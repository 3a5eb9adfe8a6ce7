"""What every way of storing quantized weights must tell, once, when a source is opened."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.header import TensorEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the stored tensors of a quantized source mean.

    Attributes:
        decoded: Name as in the original checkpoint -> how it is made.
        dropped: Stored tensor that no weight is made of -> why it is not needed.
    """

    decoded: dict[str, DecodedTensor]
    dropped: dict[str, str] = field(default_factory=dict)


ReadStored = Callable[[Collection[TensorEntry]], dict[str, torch.Tensor]]


class FindDecoded(Protocol):
    """Finds the weights of a source by the names, dtypes and shapes of what it stores.

    Which linears are quantized is told by the tensors that are there, not by lists of exceptions in the
    config, which tools match in different ways.
    """

    def __call__(
        self, quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry], read: ReadStored
    ) -> Found:
        """Everything that is made of stored tensors.

        Args:
            quantization: ``quantization_config`` of config.json.
            stored: Every tensor of the shards.
            read: Reads small tensors, for layouts that keep a shape in one.

        Raises:
            CheckpointError: Tensors that belong together are not all there, or do not fit each other.
        """
        ...
