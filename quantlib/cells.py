"""Cells of token rows, and the activations that flow through the blocks for each of them.

B sequences, T positions, D hidden. A cell has a fixed shape whatever the number of workers: what is computed
for it is the same wherever it is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quantlib.stream_shelf import Shelf


class Stream:
    """Activations on their way through the blocks.

    Args:
        hidden_BTD: Input of block 0.
        shelf: Where they wait.

    Attributes:
        position: Index of the block that comes next.
    """

    def __init__(self, hidden_BTD: torch.Tensor, shelf: Shelf) -> None:
        self._shelf, self._kept, self.position = shelf, shelf.put(hidden_BTD), 0

    @property
    def hidden_BTD(self) -> torch.Tensor:
        """Input of the block at ``position``."""
        return self._kept.get()

    @property
    def num_bytes(self) -> int:
        """Of the hidden states."""
        return self._kept.num_bytes

    @property
    def is_in_memory(self) -> bool:
        """Whether the hidden states wait where there is room for them, and not beside it."""
        return self._kept.is_in_memory

    def move(self, block: int, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Go through a block once: asked again after it has been passed, nothing happens.

        Returns:
            The hidden states behind the block, where they are worked on.
        """
        if self.position == block:
            moved_BTD = run(self.hidden_BTD)
            self.place(moved_BTD, block + 1)
            return moved_BTD
        assert self.position == block + 1, f"stream stands before block {self.position}, not {block}"
        return self.hidden_BTD

    def place(self, hidden_BTD: torch.Tensor, position: int) -> None:
        """Stand before a block without having run through those before it."""
        self.end()
        self._kept, self.position = self._shelf.put(hidden_BTD), position

    def bring(self) -> None:
        """Begin to bring the hidden states to where they are worked on; see `quantlib.stream_shelf.Kept`."""
        self._kept.bring()

    def leave(self) -> None:
        """Let go of what `bring` began and nobody asked for."""
        self._kept.leave()

    def end(self) -> None:
        """Give up the place on the shelf."""
        self._kept.release()


@dataclass(slots=True)
class Cell:
    """A fixed handful of sequences.

    Attributes:
        number: Its place among the cells of its corpus.
        first_row: Row of the corpus that is its row 0.
        ids_BT: Token ids, int32.
        shelf: Where its streams wait.
        main: The stream that calibrates, or of an evaluation cell the original stream.
        quantized: The other streams of an evaluation cell, one for each output.
        reference: The original stream of a calibration cell whose main stream is the quantized one.
    """

    number: int
    first_row: int
    ids_BT: torch.Tensor
    shelf: Shelf
    main: Stream | None = None
    quantized: tuple[Stream, ...] = ()
    reference: Stream | None = None

    def start(
        self,
        main_BTD: torch.Tensor,
        *,
        quantized: Sequence[torch.Tensor] = (),
        reference_BTD: torch.Tensor | None = None,
    ) -> None:
        """Stand before block 0.

        Args:
            main_BTD: Its input.
            quantized: The same of the quantized streams that run beside the main one.
            reference_BTD: That of a second, original stream.
        """
        self.clear()
        self.main = Stream(main_BTD, self.shelf)
        self.quantized = tuple(Stream(hidden_BTD, self.shelf) for hidden_BTD in quantized)
        self.reference = None if reference_BTD is None else Stream(reference_BTD, self.shelf)

    def clear(self) -> None:
        """Have no streams any more."""
        for _, stream in self.named_streams:
            stream.end()
        self.main = self.reference = None
        self.quantized = ()

    @property
    def named_streams(self) -> list[tuple[str, Stream]]:
        """All its streams: ``main``, those of `quantized_name`, and ``reference``, where they are."""
        quantized = [(quantized_name(number), stream) for number, stream in enumerate(self.quantized)]
        named = (("main", self.main), *quantized, ("reference", self.reference))
        return [(name, stream) for name, stream in named if stream is not None]

    def streams(self, output: int) -> tuple[Stream, Stream]:
        """Original stream of an evaluation cell, and the quantized one of an output."""
        assert self.main is not None
        return self.main, self.quantized[output]


def quantized_name(output: int) -> str:
    """What the stream through the quantized blocks of an output is called.

    >>> quantized_name(0), quantized_name(2)
    ('quantized', 'quantized-2')
    """
    return f"quantized-{output}" if output else "quantized"


def cut_into_cells(rows_BT: torch.Tensor, sequences_per_cell: int, shelf: Shelf) -> list[Cell]:
    """Neighbouring rows, in order; the last cell may hold fewer.

    >>> [tuple(cell.ids_BT.shape) for cell in cut_into_cells(torch.zeros(5, 3), 2, Shelf())]
    [(2, 3), (2, 3), (1, 3)]
    """
    return [
        Cell(
            number=number,
            first_row=start,
            ids_BT=rows_BT[start : start + sequences_per_cell],
            shelf=shelf,
        )
        for number, start in enumerate(range(0, rows_BT.shape[0], sequences_per_cell))
    ]
