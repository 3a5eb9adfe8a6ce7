"""What one worker sees of the inputs of a block's linears: exact sums over its calibration cells."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantlib.calibration.partials import Partial
from quantlib.calibration.totals import EXPERT_HEADROOM_BITS, Total, add_cell_, exponent_for
from quantlib.cells import Cell
from quantlib.errors import NumericsError
from quantlib.job.activations import CALIBRATION, cells_of
from quantlib.job.bands import SumShape, sum_shapes
from quantlib.job.expert_groups import readers_of
from quantlib.job.plan import BlockPlan, Groups, Plan
from quantlib.readers import Reader
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
            ``excluded``, rows left out now; ``tokens``; of readers inside experts ``routed``, the tokens
            they were given, and ``dropped``, those they were given besides and that were not finite;
            ``outliers``, of readers that are summed the columns that held an outlier; from cell 0
            ``exponents``.

        Raises:
            NumericsError: The cell's sums are not finite or cannot be added; names the cell, its rows and
                the linear.
        """
        if (block, groups) not in self._sums:
            self._sums[block, groups] = self._begun(block, groups)
        sums = self._sums[block, groups]
        if key not in sums.summaries:
            cell = self._cells[key]
            observed = self._observe(module, sums, cell, excluded_rows)
            partials = [
                (observed.statistics.crosses if shape.is_whole else observed.statistics.grams).get(
                    shape.reader
                )
                for shape in sums.shapes
            ]
            summary: dict[str, Any] = {
                "excluded": sorted(cell.first_row + row for row in observed.left_out),
                "tokens": observed.num_tokens,
                "routed": dict(observed.statistics.rows),
                "dropped": dict(observed.statistics.dropped),
                "outliers": {
                    number: found_C.nonzero()[:, 0].tolist()
                    for number, found_C in observed.statistics.outliers.items()
                },
                "exponents": self._exponents(sums, cell, observed, partials) if cell.number == 0 else None,
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

    def _begun(self, block: int, groups: Groups) -> "_Sums":
        plan = self._plan.blocks[block]
        shapes = sum_shapes(self._plan, block, groups)
        return _Sums(plan=plan, readers=readers_of(self._plan, plan).readers, shapes=shapes)

    def _exponents(
        self, sums: "_Sums", cell: Cell, observed: ObservedCell, partials: Sequence[Partial | None]
    ) -> list[int]:
        """One for all experts: of those that cell 0 has few tokens for, or none, it says little."""
        num_cells = len(cells_of(self._plan)[CALIBRATION])
        peaks: dict[Any, float] = {}
        for number, squares_C in observed.statistics.squares.items():
            family = sums.readers[number].family
            peaks[family] = max(float(squares_C.max()), peaks.get(family, 0.0))
        exponents = []
        for shape, partial in zip(sums.shapes, partials, strict=True):
            family = sums.readers[shape.reader].family
            with _naming(cell, sums.plan, sums.readers[shape.reader].name):
                if family is not None:
                    found = exponent_for(peaks.get(family, 0.0), num_cells, EXPERT_HEADROOM_BITS)
                else:
                    found = exponent_for(0.0 if partial is None else partial.peak, num_cells)
                exponents.append(found)
        return exponents

    def _add_pending(self, sums: "_Sums", exponents: Sequence[int] | None) -> None:
        if exponents is None:
            return
        if not sums.totals:
            sums.totals = [
                Total.zeros(shape.columns, exponent, is_whole=shape.is_whole, device=self._device)
                for shape, exponent in zip(sums.shapes, exponents, strict=True)
            ]
        for cell, partials in sums.pending:
            given = [
                (shape.reader, total, partial.panels)
                for shape, total, partial in zip(sums.shapes, sums.totals, partials, strict=True)
                if partial is not None
            ]
            for number in add_cell_([(total, panels) for _, total, panels in given]):
                reader, total, panels = given[number]
                with _naming(cell, sums.plan, sums.readers[reader].name):
                    total.refuse(panels)
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
                module,
                sums.readers,
                cell.main.hidden_BTD,
                batches,
                excluded,
                {shape.reader for shape in sums.shapes},
                centered=plan.centered_groups,
                reference_BTD=reference_BTD,
                wants_squares=cell.number == 0,
            )


@dataclass(slots=True, kw_only=True)
class _Sums:
    """A worker's share of the statistics of some input groups of a block.

    Attributes:
        readers: Of the block.
        shapes: Of the sums.
        totals: Exact sums over the cells that were added.
        pending: Cells observed before the exponents were known, and their partial sums; None of an expert
            that no token reached.
        summaries: Key of every observed cell -> what was told of it.
    """

    plan: BlockPlan
    readers: Mapping[int, Reader]
    shapes: Sequence[SumShape]
    totals: list[Total] = field(default_factory=list)
    pending: list[tuple[Cell, list[Partial | None]]] = field(default_factory=list)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)


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
