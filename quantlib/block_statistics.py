"""What one worker sees of the inputs of a block's linears: exact sums over its calibration cells."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantlib.calibration.totals import Total, exponent_for
from quantlib.cells import Cell
from quantlib.errors import NumericsError
from quantlib.job.activations import CALIBRATION, cells_of
from quantlib.job.plan import BlockPlan, Plan
from quantlib.steps import observe_cell, record_inputs
from quantlib.worker_cells import WorkerCells, following_stream


class BlockStatistics:
    """Observes cells of a worker, block after block.

    Args:
        cells: What the worker has.
        device: Where the sums are.
    """

    def __init__(self, plan: Plan, cells: WorkerCells, device: torch.device) -> None:
        self._plan, self._cells, self._device = plan, cells, device
        self._corrects: bool = plan.options["correct_targets"]
        self._sums: dict[int, _Sums] = {}

    def observe(
        self,
        module: nn.Module,
        block: int,
        key: str,
        excluded_rows: Sequence[int],
        exponents: Sequence[int] | None,
    ) -> dict[str, Any]:
        """One forward of a cell: its partial sums join the others, and its stream goes on to the next block.

        Asked again about a cell that was counted, it gives the same answer without doing anything.

        Args:
            key: Of the cell.
            excluded_rows: Calibration rows left out in blocks before.
            exponents: Of all sums, in the order of the totals; None as long as cell 0 is not observed. They
                come from that one cell so that they do not depend on who observed which cell; until they are
                there the partial sums are kept.

        Returns:
            ``excluded``, rows left out now; ``tokens``; from cell 0 ``exponents``.

        Raises:
            NumericsError: The cell's sums are not finite or cannot be added; names the cell, its rows and
                the linear.
        """
        sums = self._sums.setdefault(block, _Sums(block=block))
        plan = self._plan.blocks[block]
        if key not in sums.summaries:
            cell = self._cells[key]
            observed = self._observe(module, plan, cell, excluded_rows)
            summary: dict[str, Any] = {
                "excluded": sorted(cell.first_row + row for row in observed.left_out),
                "tokens": observed.num_tokens,
                "exponents": self._exponents(plan, cell, observed) if cell.number == 0 else None,
            }
            sums.pending.append((cell, observed))
            self._add_pending(sums, exponents or summary["exponents"])
            sums.summaries[key] = summary
            followed_BTD = observed.followed_BTD
            if followed_BTD is not None:
                following_stream(cell).move(block, lambda _: followed_BTD)
        return sums.summaries[key]

    def totals(self, block: int, exponents: Sequence[int]) -> tuple[list[Total], list[str]]:
        """The sums over the cells of a block observed since last asked, from now on someone else's.

        Returns:
            Of X^T X for every input group, then of X_ref^T X where targets are corrected; with a row and a
            column more where a group's biases are (`calibration.moments`). And the keys of the cells.

        Raises:
            NumericsError: As `observe`.
        """
        sums = self._sums.pop(block, None)
        if sums is None:
            return [], []
        self._add_pending(sums, exponents)
        return sums.totals, list(sums.summaries)

    def _exponents(self, plan: BlockPlan, cell: Cell, observed: "_Observed") -> list[int]:
        num_cells = len(cells_of(self._plan)[CALIBRATION])
        peaks = [float(gram.diagonal().max()) for gram in observed.grams]
        peaks += [float(cross.abs().max()) for cross in observed.crosses]
        exponents = []
        for number, peak in enumerate(peaks):
            with _naming(cell, plan, number):
                exponents.append(exponent_for(peak, num_cells))
        return exponents

    def _add_pending(self, sums: "_Sums", exponents: Sequence[int] | None) -> None:
        if exponents is None:
            return
        plan = self._plan.blocks[sums.block]
        sizes = _total_sizes(plan)
        if not sums.totals:
            wanted = [(size, False) for size in sizes] + [(size, True) for size in sizes if self._corrects]
            sums.totals = [
                Total.zeros(size, exponent, is_whole=is_whole, device=self._device)
                for (size, is_whole), exponent in zip(wanted, exponents, strict=True)
            ]
        for cell, observed in sums.pending:
            partials = [*observed.grams, *observed.crosses]
            for number, (total, partial_CC) in enumerate(zip(sums.totals, partials, strict=True)):
                with _naming(cell, plan, number):
                    total.add_(partial_CC)
        sums.pending.clear()

    def _observe(
        self, module: nn.Module, plan: BlockPlan, cell: Cell, excluded_rows: Sequence[int]
    ) -> "_Observed":
        assert cell.main is not None and cell.main.position == plan.index
        excluded = {row - cell.first_row for row in excluded_rows} & set(range(len(cell.ids_BT)))
        inputs = self._cells.inputs_of(cell, plan.index)
        followed_BTD, references = None, []
        if self._corrects:
            assert cell.reference is not None and cell.reference.position == plan.index
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


@dataclass(slots=True, kw_only=True)
class _Sums:
    """A worker's share of a block's statistics.

    Attributes:
        totals: Exact sums over the cells that were added.
        pending: Cells observed before the exponents were known.
        summaries: Key of every observed cell -> what was told of it.
    """

    block: int
    totals: list[Total] = field(default_factory=list)
    pending: list[tuple[Cell, "_Observed"]] = field(default_factory=list)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)


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
