"""One worker's cells of calibration and evaluation rows, and the streams that stand for them between blocks.

B sequences, T positions, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from quantlib.cell_store import read_cell, write_cell
from quantlib.cells import Cell, Stream, cut_into_cells
from quantlib.job.activations import ActivationCheckpoint, cell_key
from quantlib.job.manifest import tokens_uri
from quantlib.job.plan import Plan
from quantlib.model.skeleton import BlockInputs, OuterModel, run_block
from quantlib.storage import Store
from quantlib.tokens import read_rows


class WorkerCells:
    """Every ``num_workers``-th cell of a plan's rows, from ``number`` on.

    Args:
        store: Of the work prefix.
        go_on: Asked before every cell; raises when the job was stopped.

    Attributes:
        calibration: Cells that are observed.
        evaluation: Cells that are scored.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        *,
        number: int,
        num_workers: int,
        device: torch.device,
        go_on: Callable[[], None],
    ) -> None:
        self._plan, self._store, self._device, self._go_on = plan, store, device, go_on
        mine = slice(number, None, num_workers)
        self.calibration = self._cells(plan.calibration_digest)[mine]
        self.evaluation = self._cells(plan.evaluation_digest)[mine]
        self._inputs: dict[tuple[int, ...], list[BlockInputs]] = {}

    def embed(self, outer: OuterModel) -> None:
        """Turn token ids into the inputs of block 0."""
        for cells, is_evaluation in ((self.calibration, False), (self.evaluation, True)):
            for cell in cells:
                hidden_BTD, inputs = outer.embed(cell.ids_BT.to(self._device))
                has_reference = self._plan.options["correct_targets"] and not is_evaluation
                cell.start(hidden_BTD, compares=is_evaluation, has_reference=has_reference)
                self._inputs.setdefault(tuple(cell.ids_BT.shape), inputs)

    @property
    def num_bytes(self) -> int:
        """Bytes of all streams."""
        return sum(stream.hidden_BTD.nbytes for _, cell in self._keyed() for _, stream in cell.named_streams)

    def save(self, block: int) -> dict[str, tuple[str, int]]:
        """Store the streams, which stand before a block; cell key -> sha256 and size of its object."""
        saved = {}
        for key, cell in self._keyed():
            assert all(stream.position == block for _, stream in cell.named_streams)
            streams = {name: stream.hidden_BTD for name, stream in cell.named_streams}
            saved[key] = write_cell(self._store, self._plan.work, block, key, streams)
        return saved

    def restore(self, checkpoint: ActivationCheckpoint) -> None:
        """Put the streams where a checkpoint left them; `embed` has come before.

        Raises:
            ChecksumError: What is stored is not what was recorded; the streams are as they were.
        """
        for key, cell in self._keyed():
            stored = read_cell(self._store, self._plan.work, checkpoint, key)
            for name, stream in cell.named_streams:
                stream.place(stored[name].to(self._device), checkpoint.block)

    def inputs_of(self, cell: Cell, block: int) -> BlockInputs:
        """What a block is called with beside the hidden states of a cell."""
        return self._inputs[tuple(cell.ids_BT.shape)][block]

    def move_main(self, module: nn.Module, block: int, cells: Sequence[Cell]) -> None:
        """Run the main streams of some cells through a block."""
        for cell in cells:
            self._go_on()
            assert cell.main is not None
            cell.main.move(block, partial(run_block, module, block_inputs=self.inputs_of(cell, block)))

    def move_followers(self, module: nn.Module, block: int) -> None:
        """Run the calibration streams that follow the original blocks through one."""
        for cell in self.calibration:
            self._go_on()
            run = partial(run_block, module, block_inputs=self.inputs_of(cell, block))
            following_stream(cell).move(block, run)

    def _keyed(self) -> Iterator[tuple[str, Cell]]:
        for corpus, cells in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            for cell in cells:
                yield cell_key(corpus, cell.number), cell

    def _cells(self, digest: str | None) -> list[Cell]:
        if digest is None:
            return []
        rows_BT = read_rows(self._store, tokens_uri(self._plan.work, digest))
        return cut_into_cells(rows_BT, self._plan.sequences_per_cell)


def following_stream(cell: Cell) -> Stream:
    """The stream of a calibration cell that follows the original blocks."""
    stream = cell.reference or cell.main
    assert stream is not None
    return stream
