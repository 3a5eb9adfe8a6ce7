"""A cell goes through a block in batches of whole rows, which bounds what a forward holds at a time.

The plan fixes how many rows a batch has: a product of another shape may round differently.

B sequences, T positions, D hidden.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from quantlib.model.block_inputs import BlockInputs, run_block
from quantlib.model.outer import OuterModel

# Rows of a cell, and what a block is called with for them beside their hidden states.
Batch = tuple[slice, BlockInputs]


def batches_of(num_rows: int, rows_per_batch: int) -> Iterator[slice]:
    """Neighbouring rows, in order; the last batch may hold fewer.

    >>> [(rows.start, rows.stop) for rows in batches_of(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, num_rows, rows_per_batch):
        yield slice(start, min(start + rows_per_batch, num_rows))


class BatchInputs:
    """What blocks are called with beside hidden states, for every shape of batch that was embedded.

    Args:
        rows_per_batch: Sequences in a batch.
    """

    def __init__(self, rows_per_batch: int) -> None:
        self._rows_per_batch = rows_per_batch
        self._inputs: dict[tuple[int, ...], list[BlockInputs]] = {}

    def embed(self, outer: OuterModel, ids_BT: torch.Tensor) -> torch.Tensor:
        """The input of block 0, [B, T, D]; from now on `of` knows cells of this shape."""
        parts = []
        for rows in batches_of(len(ids_BT), self._rows_per_batch):
            hidden_BTD, inputs = outer.embed(ids_BT[rows])
            self._inputs.setdefault(tuple(ids_BT[rows].shape), inputs)
            parts.append(hidden_BTD)
        return torch.cat(parts)

    def learn(self, outer: OuterModel, ids_BT: torch.Tensor) -> None:
        """Know cells of this shape."""
        for rows in batches_of(len(ids_BT), self._rows_per_batch):
            if tuple(ids_BT[rows].shape) not in self._inputs:
                self.embed(outer, ids_BT[rows])

    def of(self, ids_BT: torch.Tensor, block: int) -> list[Batch]:
        """The batches of a cell at a block."""
        return [
            (rows, self._inputs[tuple(ids_BT[rows].shape)][block])
            for rows in batches_of(len(ids_BT), self._rows_per_batch)
        ]


def run_in_batches(module: nn.Module, hidden_BTD: torch.Tensor, batches: Sequence[Batch]) -> torch.Tensor:
    """The hidden states of a cell after a block, [B, T, D]."""
    if len(batches) == 1:
        return run_block(module, hidden_BTD, batches[0][1])
    output_BTD = torch.empty_like(hidden_BTD)
    for rows, inputs in batches:
        output_BTD[rows] = run_block(module, hidden_BTD[rows], inputs)
    return output_BTD
