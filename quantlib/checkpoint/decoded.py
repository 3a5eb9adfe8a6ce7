"""Tensors that a checkpoint means and does not store: each is made from others when it is read."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quantlib.checkpoint.header import TensorEntry
from quantlib.storage import ranges

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
# 16 MiB in fp32.
RUN_VALUES = 4 << 20
# Buffers, each as large as what is made at a time is in fp32, that making it takes: of runs of rows up to 7.5
# were measured (NF4; FP8 3), of tensors that are made at once up to 2 (GGUF).
_RUN_BUFFERS, _WHOLE_BUFFERS = 8, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedTensor:
    """How a tensor is made.

    Attributes:
        shape: Its dims.
        parts: Role -> the stored tensor that plays it; the first holds the codes. They may lie in any shards.
        make_rows: Gives fp32 values, which are rounded once, to the dtype of the checkpoint.
        row_step: Rows are made in multiples of so many; None where all must be made at once.
        run_values: About as many values are made at a time.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]
    make_rows: MakeRows
    row_step: int | None = ROW_STEP
    run_values: int = RUN_VALUES

    @property
    def run_rows(self) -> int:
        """Rows that are made at a time."""
        if self.row_step is None:
            return self.shape[0]
        step_values = max(1, self.row_step * math.prod(self.shape[1:]))
        return self.row_step * max(1, self.run_values // step_values)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.size_bytes for part in self.parts.values())

    @property
    def working_bytes(self) -> int:
        """Bytes that making it takes beside its parts and itself."""
        buffers = _WHOLE_BUFFERS if self.row_step is None else _RUN_BUFFERS
        return buffers * 4 * min(self.run_rows, self.shape[0]) * math.prod(self.shape[1:])

    def entry(self, name: str, dtype: str) -> TensorEntry:
        """As a tensor of the checkpoint, in the place of its codes."""
        codes = next(iter(self.parts.values()))
        return TensorEntry(
            name=name, dtype=dtype, shape=self.shape, shard=codes.shard, start=codes.start, end=codes.end
        )


def decoding_bytes(tensors: Collection[DecodedTensor]) -> int:
    """Most bytes that reading some tensors at once takes beside those that are made; 0 of none.

    Codes are fetched together, take no more than what is made of them, and are given back one by one: there
    are those of the tensor that is being made, and what a request brought along with them.
    """
    if not tensors:
        return 0
    stored = [made.stored_bytes for made in tensors]
    held = min(sum(stored), max(stored) + ranges.MAX_REQUEST_BYTES)
    return held + max(made.working_bytes for made in tensors)
