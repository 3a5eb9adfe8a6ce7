"""Where the cells of a job are and how far their streams have come; pieces of work that are about cells."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from quantlib.job.activations import (
    CALIBRATION,
    EVALUATION,
    ActivationCheckpoint,
    cell_key,
    cell_number,
    cells_of,
    corpus_of,
)
from quantlib.job.bundle import Bundle
from quantlib.job.holdings import Holdings
from quantlib.job.schedule import Piece, PieceId
from quantlib.job.transport import Handle, Transport, results

# Stages whose pieces are cells of either corpus.
_CALIBRATING = ("capture", "move")
_EVALUATING = ("forward", "evaluate", "score")


class CellStreams:
    """Deals cells out, brings them to whoever works on them, and makes pieces of them.

    Args:
        transport: To the workers.
        bundle: Of the job.
        holdings: Where it is noted who has what.

    Attributes:
        calibration: Keys of the calibration cells.
        evaluation: Keys of the evaluation cells.
        num_moved: How often a worker that had nothing to do took over a cell of a busy one.
    """

    def __init__(self, transport: Transport, bundle: Bundle, holdings: Holdings) -> None:
        self._transport, self._holdings, plan = transport, holdings, bundle.shared
        cells = cells_of(plan)
        self.calibration, self.evaluation = cells[CALIBRATION], cells[EVALUATION]
        self.num_moved = 0
        self._is_quantized = plan.options["propagation"] == "quantized"
        self._has_reference = plan.options["correct_targets"]
        self._dealt: list[str] = []

    @property
    def missing(self) -> list[str]:
        """Cells that nobody has."""
        return [key for key in [*self.calibration, *self.evaluation] if key not in self._holdings.homes]

    def deal(self, prelude: Sequence[Handle]) -> None:
        """Give every missing cell to a worker with fewest of its kind, which embeds it.

        Args:
            prelude: Tensors used before the first block.
        """
        homes, missing = dict(self._holdings.homes), self.missing
        shares: dict[int, list[str]] = {worker: [] for worker in self._transport.workers}
        for key in missing:
            alike = Counter(worker for other, worker in homes.items() if corpus_of(other) == corpus_of(key))
            total = Counter(homes.values())
            homes[key] = min(shares, key=lambda worker: (alike[worker], total[worker]))
            shares[homes[key]].append(key)
        # Also who has none: any cell may come to it later.
        submit = self._transport.submit
        results(self._transport, [submit(worker, "embed", prelude, keys) for worker, keys in shares.items()])
        self._holdings.homes |= homes
        self._holdings.place(missing, 0)
        self._dealt = missing

    def restore(self, checkpoint: ActivationCheckpoint) -> None:
        """Put the cells that were dealt last where a checkpoint left them."""
        homes, submit = self._holdings.homes, self._transport.submit
        # Until all have come nobody knows which did.
        self._holdings.moving.update(self._dealt)
        shares = {w: [key for key in self._dealt if homes[key] == w] for w in self._transport.workers}
        results(
            self._transport,
            [submit(worker, "restore_activations", checkpoint, keys) for worker, keys in shares.items()],
        )
        self._holdings.moving.difference_update(self._dealt)
        self._holdings.place(self._dealt, checkpoint.block)

    def forget_dealt(self) -> None:
        """Cells that are there are not to be restored."""
        self._dealt = []

    def give_up_restoring(self) -> None:
        """Those cells are missing again: some may stand where the checkpoint is and some not."""
        self._holdings.moving.difference_update(self._dealt)
        for key in self._dealt:
            self._holdings.homes.pop(key, None)

    @property
    def positions(self) -> set[int]:
        """Blocks before which some stream stands."""
        held = self._holdings
        following = {held.follows[key] for key in held.homes if self.follows(key)}
        outputs = range(len(held.outputs))
        quantized = [(key, n) for key in held.homes for n in outputs if self._runs_quantized(key, n)]
        return following | {held.outputs[output].quantized[key] for key, output in quantized}

    def follows(self, key: str) -> bool:
        """Whether a cell has a stream that follows the original blocks."""
        return self._has_reference or not self._is_quantized or corpus_of(key) == EVALUATION

    def stands(self, key: str, block: int) -> bool:
        """Whether that stream stands before a block."""
        return self.follows(key) and self._holdings.follows[key] == block

    def waits(self, key: str, block: int, output: int) -> bool:
        """Whether a cell's quantized stream of an output, if it has one, stands before a block."""
        return self._runs_quantized(key, output) and self._holdings.outputs[output].quantized[key] == block

    def pieces(self, block: int, stage: str, keys: Sequence[str], output: int = 0) -> list[Piece]:
        """A piece for every cell, numbered as the cells are; what belongs to an earlier block goes first."""
        homes = self._holdings.homes
        return [
            Piece(id=PieceId(block, stage, cell_number(key), output), rank=block, home=homes[key])
            for key in keys
        ]

    def forwards(self, block: int, *, after_evaluation: bool) -> list[Piece]:
        """Forwards of the evaluation cells through an original block.

        Args:
            after_evaluation: Whether they wait until the block before was compared.
        """
        keys = [key for key in self.evaluation if self.stands(key, block)]
        outputs = range(len(self._holdings.outputs)) if after_evaluation else ()

        def before(piece: Piece) -> frozenset[PieceId]:
            waiting = [output for output in outputs if self.waits(key_of(piece), block - 1, output)]
            return frozenset(PieceId(block - 1, "evaluate", piece.id.part, output) for output in waiting)

        return [
            dataclasses.replace(piece, after=before(piece)) for piece in self.pieces(block, "forward", keys)
        ]

    def begin(self, worker: int, piece: Piece, method: str, needs: Handle, *arguments: Any) -> Handle:
        """Have a worker do something with a piece's cell, which is brought there if another one has it.

        Args:
            needs: Of what must have gone well before; the handle that is given raises its error too.
        """
        key, needed, homes = key_of(piece), [needs], self._holdings.homes
        if homes[key] != worker:
            streams = self._transport.submit(homes[key], "give", key)
            needed.append(self._transport.submit(worker, "take", key, streams))
            homes[key] = worker
            self._holdings.moving.add(key)
            self.num_moved += 1
        return self._transport.submit(worker, method, piece.id.block, key, needed, *arguments)

    def ended(self, piece: Piece) -> None:
        """A piece went well: if it is about a cell, that is where it was brought to."""
        if piece.id.stage in (*_CALIBRATING, *_EVALUATING):
            self._holdings.moving.discard(key_of(piece))

    def _runs_quantized(self, key: str, output: int) -> bool:
        # Where calibration cells run through quantized blocks all outputs have the levels of the first.
        return corpus_of(key) == EVALUATION or (self._is_quantized and output == 0)


def after_first_cell(pieces: Sequence[Piece]) -> list[Piece]:
    """Have all pieces but the first of every worker wait for that of cell 0, whose sums all others need.

    Until it is done a worker keeps what it saw of each cell apart: of one, so that memory has a bound.
    """
    first = next(piece.id for piece in pieces if piece.id.part == 0)
    begun = {piece.home: piece.id for piece in reversed(pieces)}
    return [
        piece
        if piece.id in (first, begun[piece.home])
        else dataclasses.replace(piece, after=frozenset({first}))
        for piece in pieces
    ]


def key_of(piece: Piece) -> str:
    """The cell that a piece is about."""
    return cell_key(EVALUATION if piece.id.stage in _EVALUATING else CALIBRATION, piece.id.part)
