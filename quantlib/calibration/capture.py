"""What the linears of a block read while it runs: one gram matrix for each reader.

A reader (`quantlib.readers`) has a number: that of its input group, or of a pool of experts' tokens.

N rows, C columns, B sequences of a batch, T positions.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, cast

import torch
from torch import nn

from quantlib.calibration.partials import Partial
from quantlib.outlier_columns import outlier_columns
from quantlib.readers import Reader


@dataclass(slots=True)
class InputStatistics:
    """Partial statistics of one cell, which grow batch by batch.

    Attributes:
        grams: Reader -> X^T X, with sums for groups that are to be centered.
        crosses: Reader -> X_ref^T X, likewise, where there is a reference.
        squares: Reader -> fp32 [C], sums of squares, of those whose exponents are found together.
        outliers: Reader that is summed -> bool [C], columns that held an outlier of its own tokens.
        rows: Reader inside experts -> rows that were counted as its own.
        dropped: Reader inside experts -> rows run besides that were not finite; they are not counted.
        bad_rows: Sequences of the cell in which some reader saw a NaN or an infinity. When there are any,
            the grams are worthless and the cell is to be run again without these rows.
    """

    grams: dict[int, Partial] = field(default_factory=dict)
    crosses: dict[int, Partial] = field(default_factory=dict)
    squares: dict[int, torch.Tensor] = field(default_factory=dict)
    outliers: dict[int, torch.Tensor] = field(default_factory=dict)
    rows: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    bad_rows: set[int] = field(default_factory=set)


class _TokenSource(Protocol):
    """What is wanted of `quantlib.model.experts.Experts`."""

    tokens: torch.Tensor | None
    is_extra: bool


class _InputWatch:
    """Sees what a block's readers read, from now until the ``with`` block is left."""

    def __init__(self, block: nn.Module, readers: Mapping[int, Reader]) -> None:
        self._hooks = [
            block.get_submodule(reader.path).register_forward_pre_hook(self._hook_for(number))
            for number, reader in readers.items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, number: int, x: torch.Tensor) -> None:
        raise NotImplementedError

    def _hook_for(self, number: int):  # noqa: ANN202 - the type is torch's own
        def see(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._see(number, arguments[0])

        return see


class InputObserver(_InputWatch):
    """Watches a block's readers while a batch runs.

    Args:
        block: The live block.
        readers: By number.
        statistics: Of the cell; what is seen is added to them.
        rows: Sequences of the cell that are in the batch.
        positions: T.
        left_out: Sequences that are not to be counted.
        summed: Readers whose products are wanted; the others are only looked through for bad rows.
        references: Reader -> what it read in the reference stream, [B, T, C].
        centered: Readers whose sums are wanted beside their products.
        wants_squares: Whether sums of squares are wanted of experts' readers.
    """

    def __init__(
        self,
        block: nn.Module,
        readers: Mapping[int, Reader],
        statistics: InputStatistics,
        *,
        rows: range,
        positions: int,
        left_out: Collection[int],
        summed: Collection[int],
        references: Mapping[int, torch.Tensor],
        centered: Collection[int] = (),
        wants_squares: bool = False,
    ) -> None:
        self._statistics, self._summed, self._centered = statistics, summed, centered
        self._readers, self._references = readers, references
        self._rows, self._positions, self._left_out = rows, positions, left_out
        self._wants_squares = wants_squares
        self._sources = {
            number: cast(_TokenSource, cast(Any, block.get_submodule(reader.experts)))
            for number, reader in readers.items()
            if reader.experts is not None
        }
        super().__init__(block, readers)

    def _see(self, number: int, x: torch.Tensor) -> None:
        source, reader = self._sources.get(number), self._readers[number]
        rows_N = self._rows_of(x, source)
        if source is not None and source.is_extra:
            if reader.extra_share:
                self._add_extra(number, x.flatten(0, -2), rows_N)
            return
        kept_N = self._kept(rows_N)
        x_NC = _picked(x.flatten(0, -2), kept_N)
        if number in self._summed and len(x_NC):
            self._note_outliers(number, x_NC)
        if not reader.counts_own:
            return
        reference = self._references.get(number)
        reference_NC = None if reference is None else _picked(reference.flatten(0, -2), kept_N)
        if source is not None:
            self._statistics.rows[number] += len(x_NC)
        self._count(number, x_NC, _picked(rows_N, kept_N), reference_NC)

    def _note_outliers(self, number: int, x_NC: torch.Tensor) -> None:
        found_C, before_C = outlier_columns(x_NC), self._statistics.outliers.get(number)
        self._statistics.outliers[number] = found_C if before_C is None else before_C | found_C

    def _add_extra(self, number: int, x_NC: torch.Tensor, rows_N: torch.Tensor) -> None:
        """Rows that an expert was not given: weighed, and not worth leaving a sequence out for."""
        weight = self._readers[number].extra_share * len(self._rows) * self._positions / max(1, len(x_NC))
        finite_N = torch.isfinite(x_NC).all(dim=1)
        self._statistics.dropped[number] += int((~finite_N).sum())
        kept_N = self._kept(rows_N)
        x_NC = x_NC[finite_N if kept_N is None else finite_N & kept_N]
        # A GPU multiplies 16 bits many times as fast: what weighs as much as a token of its own keeps them.
        if weight != 1 or not x_NC.is_cuda:
            x_NC = x_NC.float() * weight**0.5
        if not self._readers[number].counts_own:
            self._statistics.rows[number] += len(x_NC)
        self._count(number, x_NC, None, None)

    def _count(
        self,
        number: int,
        x_NC: torch.Tensor,
        rows_N: torch.Tensor | None,
        reference_NC: torch.Tensor | None,
    ) -> None:
        if self._wants_squares and self._readers[number].family is not None:
            squares_C, before = x_NC.float().square().sum(0), self._statistics.squares.get(number)
            self._statistics.squares[number] = squares_C if before is None else before + squares_C
        if reference_NC is not None:
            self._look_through(reference_NC, rows_N)
        if number not in self._summed:
            # Of finite values the sum may overflow too, but then no row is to blame.
            if not torch.isfinite(x_NC.sum(dtype=torch.float32)):
                self._look_through(x_NC, rows_N)
            return
        gram = self._partial(self._statistics.grams, number, x_NC, is_whole=False)
        gram.add_(x_NC)
        # A non-finite input shows in the sum of squares of its column: no second pass over the tokens.
        if not torch.isfinite(gram.diagonal).all():
            self._look_through(x_NC, rows_N)
        if reference_NC is not None:
            cross = self._partial(self._statistics.crosses, number, x_NC, is_whole=True)
            cross.add_(x_NC, reference_NC)

    def _partial(
        self, partials: dict[int, Partial], number: int, x_NC: torch.Tensor, *, is_whole: bool
    ) -> Partial:
        if number not in partials:
            partials[number] = Partial(
                x_NC.shape[1], is_whole=is_whole, has_sums=number in self._centered, device=x_NC.device
            )
        return partials[number]

    def _look_through(self, x_NC: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        if rows_N is not None:
            self._statistics.bad_rows |= set(rows_N[~torch.isfinite(x_NC).all(dim=1)].tolist())

    def _rows_of(self, x: torch.Tensor, source: _TokenSource | None) -> torch.Tensor:
        """int64 [N]: of every row that is read the sequence of the cell that it is of."""
        if source is not None and source.tokens is not None:
            return source.tokens // self._positions + self._rows.start
        rows_B = torch.arange(self._rows.start, self._rows.stop, device=x.device)
        return rows_B.repeat_interleave(x.shape[:-1].numel() // len(rows_B))

    def _kept(self, rows_N: torch.Tensor) -> torch.Tensor | None:
        """bool [N], whether rows are counted; None when all are."""
        out = [row for row in self._rows if row in self._left_out]
        return ~torch.isin(rows_N, torch.tensor(out, device=rows_N.device)) if out else None


class InputRecorder(_InputWatch):
    """Keeps the inputs of a block's readers during one forward pass.

    Attributes:
        inputs: What each read, by number.
    """

    def __init__(self, block: nn.Module, readers: Mapping[int, Reader]) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        super().__init__(block, readers)

    def _see(self, number: int, x: torch.Tensor) -> None:
        self.inputs[number] = x


def _picked(values: torch.Tensor, kept_N: torch.Tensor | None) -> torch.Tensor:
    return values if kept_N is None else values[kept_N]
