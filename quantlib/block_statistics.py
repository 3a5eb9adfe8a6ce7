"""What one worker sees of the inputs of a block's linears: exact sums over its calibration cells."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantlib.calibration.partials import Partial
from quantlib.calibration.totals import Total, exponent_for
from quantlib.cells import Cell
from quantlib.errors import NumericsError
from quantlib.job.activations import CALIBRATION, cells_of
from quantlib.job.bands import sum_shapes
from quantlib.job.plan import BlockPlan, Groups, Plan
from quantlib.steps import ObservedCell, observe_cell
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
        self._follows = self._corrects or plan.options["propagation"] == "original"
        self._sums: dict[tuple[int, Groups], _Sums] = {}

    def observe(
        self,
        module: nn.Module,
        block: int,
        key: str,
        groups: Groups,
        excluded_rows: Sequence[int],
        exponents: Sequence[int] | None,
        *,
        moves: bool,
    ) -> dict[str, Any]:
        """One forward of a cell: its partial sums join the others.

        Asked again about a cell that was counted, it gives the same answer without doing anything.

        Args:
            key: Of the cell.
            groups: Input groups that are summed; all are looked through for rows that are not finite.
            excluded_rows: Calibration rows left out so far.
            exponents: Of all sums, in the order of the totals; None as long as cell 0 is not observed. They
                come from that one cell so that they do not depend on who observed which cell; until they are
                there the partial sums are kept.
            moves: Whether the stream that follows the original blocks goes on to the next one.

        Returns:
            ``excluded``, rows left out now; ``tokens``; from cell 0 ``exponents``.

        Raises:
            NumericsError: The cell's sums are not finite or cannot be added; names the cell, its rows and
                the linear.
        """
        sums = self._sums.setdefault((block, groups), _Sums(plan=self._plan.blocks[block], groups=groups))
        if key not in sums.summaries:
            cell = self._cells[key]
            observed = self._observe(module, sums, cell, excluded_rows)
            partials = self._partials(sums, observed)
            summary: dict[str, Any] = {
                "excluded": sorted(cell.first_row + row for row in observed.left_out),
                "tokens": observed.num_tokens,
                "exponents": self._exponents(sums, cell, partials) if cell.number == 0 else None,
            }
            sums.pending.append((cell, partials))
            self._add_pending(sums, exponents or summary["exponents"])
            sums.summaries[key] = summary
            if moves and self._follows:
                reference_BTD, output_BTD = observed.reference_BTD, observed.output_BTD
                followed_BTD = output_BTD if reference_BTD is None else reference_BTD
                following_stream(cell).move(block, lambda _: followed_BTD)
        return sums.summaries[key]

    def totals(self, block: int, groups: Groups, exponents: Sequence[int]) -> tuple[list[Total], list[str]]:
        """The sums over the cells of a block observed since last asked, from now on someone else's.

        Returns:
            Those of `quantlib.job.bands.sum_shapes`, and the keys of the cells.

        Raises:
            NumericsError: As `observe`.
        """
        sums = self._sums.pop((block, groups), None)
        if sums is None:
            return [], []
        self._add_pending(sums, exponents)
        return sums.totals, list(sums.summaries)

    def _exponents(self, sums: "_Sums", cell: Cell, partials: Sequence[Partial | None]) -> list[int]:
        num_cells = len(cells_of(self._plan)[CALIBRATION])
        exponents = []
        for number, partial in enumerate(partials):
            with _naming(cell, sums.plan, sums.leader(number)):
                exponents.append(exponent_for(0.0 if partial is None else partial.peak, num_cells))
        return exponents

    def _add_pending(self, sums: "_Sums", exponents: Sequence[int] | None) -> None:
        if exponents is None:
            return
        if not sums.totals:
            shapes = sum_shapes(self._plan, sums.plan.index, sums.groups)
            sums.totals = [
                Total.zeros(shape.columns, exponent, is_whole=shape.is_whole, device=self._device)
                for shape, exponent in zip(shapes, exponents, strict=True)
            ]
        for cell, partials in sums.pending:
            for number, (total, partial) in enumerate(zip(sums.totals, partials, strict=True)):
                with _naming(cell, sums.plan, sums.leader(number)):
                    if partial is not None:
                        total.add_(partial.panels)
        sums.pending.clear()

    def _observe(
        self, module: nn.Module, sums: "_Sums", cell: Cell, excluded_rows: Sequence[int]
    ) -> ObservedCell:
        plan = sums.plan
        assert cell.main is not None and cell.main.position == plan.index
        excluded = {row - cell.first_row for row in excluded_rows} & set(range(len(cell.ids_BT)))
        reference_BTD = None
        if self._corrects:
            assert cell.reference is not None and cell.reference.position == plan.index
            reference_BTD = cell.reference.hidden_BTD
        batches = self._cells.batches_of(cell, plan.index)
        with _naming(cell, plan):
            return observe_cell(
                module, plan, cell.main.hidden_BTD, batches, excluded, sums.groups, reference_BTD
            )

    def _partials(self, sums: "_Sums", observed: ObservedCell) -> list[Partial | None]:
        """X^T X of every group that is summed, then X_ref^T X where targets are corrected; None of a group
        that no token reached."""
        statistics = observed.statistics
        kinds = (statistics.grams, statistics.crosses)[: 1 + self._corrects]
        return [found.get(group) for found in kinds for group in sums.groups]


@dataclass(slots=True, kw_only=True)
class _Sums:
    """A worker's share of the statistics of some input groups of a block.

    Attributes:
        totals: Exact sums over the cells that were added.
        pending: Cells observed before the exponents were known, and their partial sums.
        summaries: Key of every observed cell -> what was told of it.
    """

    plan: BlockPlan
    groups: Groups
    totals: list[Total] = field(default_factory=list)
    pending: list[tuple[Cell, list[Partial | None]]] = field(default_factory=list)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def leader(self, total: int) -> str:
        """A linear that reads what a total is a sum of."""
        return self.plan.input_groups[self.groups[total % len(self.groups)]][0]


@contextmanager
def _naming(cell: Cell, plan: BlockPlan, linear: str | None = None) -> Iterator[None]:
    """Let an error say in which rows of the calibration text to look, and at the input of which linear."""
    try:
        yield
    except NumericsError as error:
        first, last = cell.first_row, cell.first_row + len(cell.ids_BT) - 1
        facts: dict[str, object] = {"block": plan.index, "cell": cell.number}
        place = plan.prefix
        if linear is not None:
            facts["linear"] = place = linear
        raise NumericsError(
            f"{place}, calibration cell {cell.number} (rows {first} to {last}): {error.message}",
            **{**error.facts, **facts},
        ) from error
