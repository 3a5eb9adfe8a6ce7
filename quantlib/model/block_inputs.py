"""What a decoder block is called with besides the hidden state, and the stand-ins that find out.

Rotary embeddings and masks differ from family to family. They come from the model's own forward, run with
stand-ins in place of the blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache

from quantlib.errors import UnsupportedModelError
from quantlib.model.trace import split_hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """Arguments of one block without the hidden state, as the model passes them.

    Tensors that the model shares between blocks are shared here too. They hold for batches of the shape they
    were made with.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def run_block(block: nn.Module, hidden_BTD: torch.Tensor, block_inputs: BlockInputs) -> torch.Tensor:
    """The hidden state after a block. Shapes: floating [B, T, D] in and out."""
    output = block(hidden_BTD, *block_inputs.args, **block_inputs.kwargs)
    return output[0] if isinstance(output, tuple | list) else output


class PreludeDone(Exception):  # noqa: N818 - it reports success
    """Ends a forward once every block's inputs are known; the tail's weights need not be there."""


@dataclass(slots=True, kw_only=True)
class Recording:
    """What the stand-ins of one forward saw."""

    hidden: torch.Tensor | None = None
    inputs: list[BlockInputs] = field(default_factory=list)


class StandIn(nn.Module):
    """Takes a block's place: passes the hidden state on and returns what the block would return.

    Attributes the model reads from its blocks (attention type, position) are those of the real one.
    """

    def __init__(self, block: nn.Module, num_outputs: int | None) -> None:
        super().__init__()
        # In __dict__, not registered: a submodule would bring the block's weights into the model's tree.
        self.__dict__["_block"] = block
        self.__dict__["_num_outputs"] = num_outputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state, in the form the block returns it."""
        return self._as_block_output(args[0] if args else kwargs["hidden_states"])

    def _as_block_output(self, hidden_BTD: torch.Tensor) -> Any:
        num_outputs = self.__dict__["_num_outputs"]
        return hidden_BTD if num_outputs is None else (hidden_BTD,) + (None,) * (num_outputs - 1)


class RecordingStandIn(StandIn):
    """Notes what the block is called with; the last one ends the forward."""

    def __init__(
        self, block: nn.Module, num_outputs: int | None, recording: Recording, *, is_last: bool
    ) -> None:
        super().__init__(block, num_outputs)
        self.__dict__["_recording"] = recording
        self.__dict__["_is_last"] = is_last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state, in the form the block returns it.

        Raises:
            UnsupportedModelError: The model hands its blocks a cache although it was told not to.
            PreludeDone: This was the last block.
        """
        hidden_BTD, args, kwargs = split_hidden(args, kwargs)
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise UnsupportedModelError(
                "the model passes a cache to its blocks although caches are switched off;"
                " its blocks cannot be run one by one"
            )
        recording: Recording = self.__dict__["_recording"]
        if recording.hidden is None:
            recording.hidden = hidden_BTD
        recording.inputs.append(BlockInputs(args=args, kwargs=kwargs))
        if self.__dict__["_is_last"]:
            raise PreludeDone
        return self._as_block_output(hidden_BTD)


class ReturningStandIn(StandIn):
    """Returns a hidden state it was made with, whatever it is called with."""

    def __init__(self, block: nn.Module, num_outputs: int | None, hidden_BTD: torch.Tensor) -> None:
        super().__init__(block, num_outputs)
        self.__dict__["_hidden_BTD"] = hidden_BTD

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The given hidden state, in the form the block returns it."""
        del args, kwargs
        return self._as_block_output(self.__dict__["_hidden_BTD"])
