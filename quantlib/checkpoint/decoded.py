"""Tensors that a checkpoint means and does not store: each is made from others when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quantlib.checkpoint.header import TensorEntry

if TYPE_CHECKING:
    import torch


class MakeRows(Protocol):
    """Makes a run of rows of a tensor from what is stored of it."""

    def __call__(self, parts: Mapping[str, "torch.Tensor"], start: int, end: int) -> "torch.Tensor":
        """Rows [start, end), fp32; ``start`` is a multiple of `DecodedTensor.row_step`.

        Args:
            parts: Role -> stored tensor, as `DecodedTensor.parts` names them.
            start: First row.
            end: One past the last row.

        Raises:
            CheckpointError: The parts contradict each other.
        """
        ...


# Codes of any width fill whole words in so many rows.
ROW_STEP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedTensor:
    """How a tensor is made.

    Attributes:
        shape: Its dims.
        parts: Role -> the stored tensor that plays it; the first holds the codes. They may lie in any shards.
        make_rows: Gives fp32 values, which are rounded once, to the dtype of the checkpoint.
        row_step: Rows are made in multiples of so many; None where all must be made at once.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]
    make_rows: MakeRows
    row_step: int | None = ROW_STEP

    def entry(self, name: str, dtype: str) -> TensorEntry:
        """As a tensor of the checkpoint, in the place of its codes."""
        codes = next(iter(self.parts.values()))
        return TensorEntry(
            name=name, dtype=dtype, shape=self.shape, shard=codes.shard, start=codes.start, end=codes.end
        )
