"""What one worker sees of the inputs of a block's linears: exact sums over its calibration cells."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from quantlib.calibration.hessian import add_partial_, exponent_for
from quantlib.cells import Cell
from quantlib.errors import NumericsError
from quantlib.job.plan import BlockPlan, Plan
from quantlib.steps import observe_cell, record_inputs
from quantlib.worker_cells import WorkerCells, following_stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A worker's share of a block's statistics.

    Attributes:
        totals: int64 [C, C] of X^T X for every input group, then of X_ref^T X where targets are corrected;
            one row and column more where a group's biases are (`calibration.moments`).
        num_tokens: Tokens counted.
        excluded_rows: All rows left out so far.
    """

    totals: list[torch.Tensor]
    num_tokens: int
    excluded_rows: list[int]


class BlockStatistics:
    """Observes the cells of a worker, block after block.

    Args:
        go_on: Asked before every cell; raises when the job was stopped.
    """

    def __init__(
        self, plan: Plan, cells: WorkerCells, device: torch.device, go_on: Callable[[], None]
    ) -> None:
        self._plan, self._cells, self._device, self._go_on = plan, cells, device, go_on
        self._corrects: bool = plan.options["correct_targets"]
        self._excluded: set[int] = set()
        self._begun: tuple[int, _Observed] | None = None

    def begin(self, module: nn.Module, block: int, excluded_rows: Sequence[int]) -> list[int] | None:
        """Observe the first cell; with cell 0 also the exponents of all sums, in the order of the totals.

        The exponents come from one fixed cell so that they do not depend on how many workers there are.

        Args:
            excluded_rows: Calibration rows left out in blocks before.

        Raises:
            NumericsError: The cell's sums are not finite; names the cell, its rows and the linear.
        """
        if not self._cells.calibration:
            return None
        first = self._cells.calibration[0]
        self._excluded = set(excluded_rows)
        observed = self._observe(module, block, first)
        self._begun = (block, observed)
        if first.number != 0:
            return None
        num_cells = -(-self._plan.options["sequences"] // self._plan.sequences_per_cell)
        peaks = [float(gram.diagonal().max()) for gram in observed.grams]
        peaks += [float(cross.abs().max()) for cross in observed.crosses]
        plan, exponents = self._plan.blocks[block], []
        for number, peak in enumerate(peaks):
            with _naming(first, plan, number):
                exponents.append(exponent_for(peak, num_cells))
        return exponents

    def gather(self, module: nn.Module, block: int, exponents: Sequence[int]) -> Gathered:
        """Observe the other cells, add all up exactly, and move the streams to the next block.

        Raises:
            NumericsError: A cell's sums cannot be added; names the cell, its rows and the linear.
        """
        plan = self._plan.blocks[block]
        sizes = _total_sizes(plan)
        num_groups = len(sizes)
        sizes = sizes * 2 if self._corrects else sizes
        totals = [torch.zeros(size, size, dtype=torch.int64, device=self._device) for size in sizes]
        tokens = 0
        for cell in self._cells.calibration:
            observed = self._observed(module, block, cell)
            sums = [*observed.grams, *observed.crosses]
            for number, (total, partial_CC) in enumerate(zip(totals, sums, strict=True)):
                with _naming(cell, plan, number):
                    add_partial_(total, partial_CC, exponents[number], is_whole=number >= num_groups)
            self._excluded |= {cell.first_row + row for row in observed.left_out}
            tokens += observed.num_tokens
            if observed.followed_BTD is not None:
                following_stream(cell).move(block, lambda _, moved=observed.followed_BTD: moved)
        return Gathered(totals=totals, num_tokens=tokens, excluded_rows=sorted(self._excluded))

    def _observed(self, module: nn.Module, block: int, cell: Cell) -> "_Observed":
        if self._begun is not None and self._begun[0] == block and cell is self._cells.calibration[0]:
            observed, self._begun = self._begun[1], None
            return observed
        return self._observe(module, block, cell)

    def _observe(self, module: nn.Module, block: int, cell: Cell) -> "_Observed":
        self._go_on()
        assert cell.main is not None and cell.main.position == block
        excluded = {row - cell.first_row for row in self._excluded} & set(range(len(cell.ids_BT)))
        inputs, plan = self._cells.inputs_of(cell, block), self._plan.blocks[block]
        followed_BTD, references = None, []
        if self._corrects:
            assert cell.reference is not None and cell.reference.position == block
            followed_BTD, references = record_inputs(module, plan, cell.reference.hidden_BTD, inputs)
        with _naming(cell, plan):
            output_BTD, statistics, left_out = observe_cell(
                module, plan, cell.main.hidden_BTD, inputs, excluded, references
            )
        if self._plan.options["propagation"] == "original":
            followed_BTD = output_BTD
        return _Observed(
            grams=[gram for gram in statistics.grams if gram is not None],
            crosses=statistics.crosses,
            num_tokens=statistics.num_tokens,
            left_out=left_out,
            followed_BTD=followed_BTD,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observed:
    """What one forward of a calibration cell gave.

    Attributes:
        grams: X^T X of every input group.
        crosses: X_ref^T X of every input group, where targets are corrected.
        num_tokens: Tokens counted.
        left_out: Rows of the cell that are not finite.
        followed_BTD: Where the stream that follows the original blocks has come to, if the cell has one.
    """

    grams: list[torch.Tensor]
    crosses: list[torch.Tensor]
    num_tokens: int
    left_out: set[int]
    followed_BTD: torch.Tensor | None


def _total_sizes(plan: BlockPlan) -> list[int]:
    """Rows of the totals of every input group."""
    columns = {linear.name: linear.columns for linear in plan.linears}
    centered = plan.centered_groups
    return [columns[group[0]] + (n in centered) for n, group in enumerate(plan.input_groups)]


@contextmanager
def _naming(cell: Cell, plan: BlockPlan, total: int | None = None) -> Iterator[None]:
    """Let an error say in which rows of the calibration text to look, and at the input of which linear."""
    try:
        yield
    except NumericsError as error:
        first, last = cell.first_row, cell.first_row + len(cell.ids_BT) - 1
        facts: dict[str, object] = {"block": plan.index, "cell": cell.number}
        place = plan.prefix
        if total is not None:
            facts["linear"] = place = plan.input_groups[total % len(plan.input_groups)][0]
        raise NumericsError(
            f"{place}, calibration cell {cell.number} (rows {first} to {last}): {error.message}",
            **{**error.facts, **facts},
        ) from error
