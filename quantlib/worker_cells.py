"""One worker's cells of calibration and evaluation rows, and the streams that stand for them between blocks.

B sequences, T positions, D hidden.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from quantlib.batches import Batch, BatchInputs, run_in_batches
from quantlib.cell_store import read_cell, write_cell
from quantlib.cells import Cell, Stream, cut_into_cells, quantized_name
from quantlib.job.activations import (
    CALIBRATION,
    EVALUATION,
    ActivationCheckpoint,
    cell_key,
    cell_number,
    corpus_of,
)
from quantlib.job.bundle import Bundle
from quantlib.job.manifest import tokens_uri
from quantlib.model.skeleton import OuterModel
from quantlib.storage import Store
from quantlib.stream_shelf import Shelf
from quantlib.tokens import read_rows


class WorkerCells:
    """The cells of a job's rows that a worker has.

    Args:
        store: Of the shared work prefix.
        shelf: Where their streams wait.
    """

    def __init__(self, bundle: Bundle, store: Store, device: torch.device, shelf: Shelf) -> None:
        self._plan, self._store, self._device, self._shelf = bundle.shared, store, device, shelf
        plan, self._identities = bundle.shared, [output.identity() for output in bundle.outputs]
        self._round_ends = [bool(output.rounded) for output in bundle.outputs]
        digests = {CALIBRATION: plan.calibration_digest, EVALUATION: plan.evaluation_digest}
        self._all = {
            cell_key(corpus, cell.number): cell
            for corpus, digest in digests.items()
            for cell in self._cut(digest)
        }
        self._mine: dict[str, Cell] = {}
        self._coming: list[Stream] = []
        self._inputs = BatchInputs(plan.sequences_per_batch)

    def __getitem__(self, key: str) -> Cell:
        return self._mine[key]

    def embed(self, outer: OuterModel, rounded: OuterModel | None, keys: Sequence[str]) -> None:
        """Have some more cells: their token ids as inputs of block 0.

        Args:
            outer: The original model around its blocks.
            rounded: The same with the levels of outputs that round their embedding; None where none does.
        """
        for key in keys:
            cell = self._all[key]
            hidden_BTD = self._inputs.embed(outer, cell.ids_BT)
            levels_BTD = hidden_BTD if rounded is None else self._inputs.embed(rounded, cell.ids_BT)
            quantized = [levels_BTD if rounds else hidden_BTD for rounds in self._round_ends]
            if corpus_of(key) == EVALUATION:
                cell.start(hidden_BTD, quantized=quantized)
            elif self._plan.options["propagation"] == "quantized":
                # Its streams are those of the first output, and outputs of other levels are made apart.
                has_reference = self._plan.options["correct_targets"]
                cell.start(quantized[0], reference_BTD=hidden_BTD if has_reference else None)
            else:
                cell.start(hidden_BTD)
            self._mine[key] = cell
        # Any cell may come here later, and with it only its streams.
        for cell in self._all.values():
            self._inputs.learn(outer, cell.ids_BT)

    def keep(self, keys: Sequence[str]) -> None:
        """Have no other cells than these any more."""
        for key in self._mine.keys() - set(keys):
            self._mine.pop(key).clear()

    def give(self, key: str) -> dict[str, tuple[torch.Tensor, int]]:
        """Part with a cell: its streams on the CPU and where they stand."""
        cell = self._mine.pop(key)
        streams = {name: (stream.hidden_BTD.cpu(), stream.position) for name, stream in cell.named_streams}
        cell.clear()
        return streams

    def take(self, key: str, streams: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        """Have a cell that another worker gave."""
        cell = self._all[key]
        # What was given may be mapped from memory that others read too.
        here = {name: hidden_BTD.to(self._device, copy=True) for name, (hidden_BTD, _) in streams.items()}
        num_quantized = sum(name.startswith(quantized_name(0)) for name in streams)
        cell.start(
            here["main"],
            quantized=[here[quantized_name(number)] for number in range(num_quantized)],
            reference_BTD=here.get("reference"),
        )
        for name, stream in cell.named_streams:
            _, stream.position = streams[name]
        self._mine[key] = cell

    @property
    def num_bytes(self) -> int:
        """Bytes of all streams."""
        streams = [stream for cell in self._mine.values() for _, stream in cell.named_streams]
        return sum(stream.num_bytes for stream in streams)

    def save(self, block: int) -> dict[str, tuple[str, int]]:
        """Store the streams, which stand before a block; cell key -> sha256 and size of its object."""
        saved = {}
        for key, cell in self._mine.items():
            assert all(stream.position == block for _, stream in cell.named_streams)
            streams = {name: stream.hidden_BTD for name, stream in cell.named_streams}
            saved[key] = write_cell(self._store, self._plan.work, block, key, streams)
        return saved

    def restore(self, checkpoint: ActivationCheckpoint, keys: Sequence[str]) -> None:
        """Put the streams of some cells where a checkpoint left them; `embed` has come before.

        Raises:
            ChecksumError: What is stored is not what was recorded; the streams are as they were.
        """
        # It may hold the streams of more outputs, in another order.
        places = [checkpoint.identities.index(identity) for identity in self._identities]
        stored_as = {quantized_name(mine): quantized_name(theirs) for mine, theirs in enumerate(places)}
        for key in keys:
            cell = self._mine[key]
            stored = read_cell(self._store, self._plan.work, checkpoint, key)
            for name, stream in cell.named_streams:
                stream.place(stored[stored_as.get(name, name)].to(self._device), checkpoint.block)

    def batches_of(self, cell: Cell, block: int) -> list[Batch]:
        """The batches of a cell, with what a block is called with beside their hidden states."""
        return self._inputs.of(cell.ids_BT, block)

    def move(self, stream: Stream, cell: Cell, module: nn.Module, block: int) -> torch.Tensor:
        """Run a stream of a cell through a block; gives what `Stream.move` does."""
        return stream.move(block, partial(run_in_batches, module, batches=self.batches_of(cell, block)))

    def bring_next(self, key: str, names: Collection[str]) -> None:
        """While a cell is worked on, begin to bring streams of the next one of its corpus to the device.

        What was brought so and is not asked for, as another cell is worked on next, is let go of at a later
        call: at any time no more than two cells are brought.
        """
        current = self._named_streams(key).values()
        for stream in self._coming:
            if all(stream is not mine for mine in current):
                stream.leave()
        # Another thread may give cells to other workers meanwhile.
        following = self._named_streams(next_key(key, list(self._mine)))
        coming = [stream for name, stream in following.items() if name in names]
        self._coming = [stream for stream in (*current, *coming) if not stream.is_in_memory]
        for stream in coming:
            stream.bring()

    def _named_streams(self, key: str | None) -> dict[str, Stream]:
        cell = self._mine.get(key) if key is not None else None
        return {} if cell is None else dict(cell.named_streams)

    def _cut(self, digest: str | None) -> list[Cell]:
        if digest is None:
            return []
        rows_BT = read_rows(self._store, tokens_uri(self._plan.work, digest))
        return cut_into_cells(rows_BT, self._plan.sequences_per_cell, self._shelf)


def next_key(key: str, keys: Iterable[str]) -> str | None:
    """The cell of the same corpus whose number is the next higher one; None behind the last.

    >>> next_key(cell_key(CALIBRATION, 2), [cell_key(CALIBRATION, number) for number in (7, 2, 4)])
    'calibration-00004'
    """
    higher = [x for x in keys if corpus_of(x) == corpus_of(key) and cell_number(x) > cell_number(key)]
    return min(higher, key=cell_number, default=None)


def following_stream(cell: Cell) -> Stream:
    """The stream of a calibration cell that follows the original blocks."""
    stream = cell.reference or cell.main
    assert stream is not None
    return stream
