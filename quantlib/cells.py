"""Cells of token rows, and the activations that flow through the blocks for each of them.

B sequences, T positions, D hidden. A cell has a fixed shape whatever the number of workers: what is computed
for it is the same wherever it is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Stream:
    """Activations on their way through the blocks.

    Attributes:
        hidden_BTD: Input of the block at ``position``.
        position: Index of the block that comes next.
    """

    hidden_BTD: torch.Tensor
    position: int = 0

    def move(self, block: int, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Go through a block once: asked again after it has been passed, nothing happens."""
        if self.position == block:
            self.hidden_BTD = run(self.hidden_BTD)
            self.position = block + 1
        assert self.position == block + 1, f"stream stands before block {self.position}, not {block}"

    def place(self, hidden_BTD: torch.Tensor, position: int) -> None:
        """Stand before a block without having run through those before it."""
        self.hidden_BTD = hidden_BTD
        self.position = position


@dataclass(slots=True)
class Cell:
    """A fixed handful of sequences.

    Attributes:
        number: Its place among the cells of its corpus.
        first_row: Row of the corpus that is its row 0.
        ids_BT: Token ids, int32.
        main: The stream that calibrates, or of an evaluation cell the original stream.
        quantized: The other stream of an evaluation cell.
        reference: The original stream of a calibration cell whose main stream is the quantized one.
    """

    number: int
    first_row: int
    ids_BT: torch.Tensor
    main: Stream | None = None
    quantized: Stream | None = None
    reference: Stream | None = None

    def start(self, hidden_BTD: torch.Tensor, *, compares: bool, has_reference: bool = False) -> None:
        """Stand before block 0.

        Args:
            hidden_BTD: Its input.
            compares: Whether a second, quantized stream runs beside the first.
            has_reference: Whether a second, original stream does.
        """
        self.main = Stream(hidden_BTD)
        self.quantized = Stream(hidden_BTD) if compares else None
        self.reference = Stream(hidden_BTD) if has_reference else None

    def clear(self) -> None:
        """Have no streams any more."""
        self.main = self.quantized = self.reference = None

    @property
    def named_streams(self) -> list[tuple[str, Stream]]:
        """All its streams: ``main``, and ``quantized`` and ``reference`` where they are."""
        named = (("main", self.main), ("quantized", self.quantized), ("reference", self.reference))
        return [(name, stream) for name, stream in named if stream is not None]

    @property
    def streams(self) -> tuple[Stream, Stream]:
        """Original and quantized stream of an evaluation cell."""
        assert self.main is not None and self.quantized is not None
        return self.main, self.quantized


def cut_into_cells(rows_BT: torch.Tensor, sequences_per_cell: int) -> list[Cell]:
    """Neighbouring rows, in order; the last cell may hold fewer.

    >>> [tuple(cell.ids_BT.shape) for cell in cut_into_cells(torch.zeros(5, 3, dtype=torch.int32), 2)]
    [(2, 3), (2, 3), (1, 3)]
    """
    return [
        Cell(number=number, first_row=start, ids_BT=rows_BT[start : start + sequences_per_cell])
        for number, start in enumerate(range(0, rows_BT.shape[0], sequences_per_cell))
    ]
