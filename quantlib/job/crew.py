"""The workers of one job: who does which part of a stage, and what travels between them.

A worker is a `quantlib.block_runner.BlockRunner` somewhere: in this process, or inside a Ray actor. A
`Transport` starts its methods and hands back handles; a handle given as an argument reaches the other worker
as the value it stands for. Tensors travel only so, never through this object. Each public method is one
stage of the conversion.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from quantlib.errors import NumericsError, QuantError
from quantlib.job.activations import CALIBRATION, EVALUATION, ActivationCheckpoint, cells_of
from quantlib.job.dispatch import Dispatcher
from quantlib.job.manifest import DoneRecord
from quantlib.job.options import JobOptions
from quantlib.job.plan import BlockPlan, Plan, UnitPlan
from quantlib.job.schedule import Piece, PieceId
from quantlib.storage import normalize_uri

Handle = Any

_ADDRESSES = ("source", "output", "work", "calibration", "evaluation")

# Calibration rows whose activations overflow are left out; with more of them than this the model or the
# text is at fault and codes fitted to the rest would be worth little.
MAX_EXCLUDED_SHARE = 0.1

# Stages whose pieces are evaluation cells.
_OF_EVALUATION = ("forward", "evaluate", "score")


class Transport(Protocol):
    """Starts methods of numbered workers and waits for them."""

    @property
    def num_workers(self) -> int:
        """How many workers there are now."""
        ...

    def submit(self, worker: int, method: str, *arguments: Any) -> Handle:
        """Start ``method`` on a worker; handles among the arguments (also inside lists) become values."""
        ...

    def result(self, handle: Handle) -> Any:
        """Wait for a handle's value; raises our own errors."""
        ...

    def when_done(self, handle: Handle, call: Callable[[], None]) -> None:
        """Call, from any thread, once a handle has its value or its error; the call returns at once."""
        ...

    def feel_pulses(self) -> None:
        """Make sure that all workers live.

        Raises:
            WorkerLostError: One is gone or silent.
        """
        ...

    def renew(self) -> None:
        """Start all workers anew, elsewhere or fewer of them where that must be.

        Raises:
            WorkerError: Not one could be had.
        """
        ...


class Crew:
    """All workers of one job, driven stage by stage.

    Args:
        transport: How to reach the workers.
        threads: CPU threads a worker has.

    Attributes:
        moved_cells: How often a worker that had nothing to do took over a cell of a busy one.
    """

    def __init__(self, transport: Transport, threads: int) -> None:
        self._transport = transport
        self._threads = threads
        self._dispatcher: Dispatcher | None = None
        self._sources: dict[int, list[Handle]] = {}
        self._packed: dict[int, list[Handle]] = {}
        self._statistics: dict[int, list[list[Any]]] = {}
        # What stands in a worker's place for a module, by kind: the block, and the handle of its making.
        self._loaded: dict[tuple[int, str], tuple[int, Handle]] = {}
        self._homes: dict[str, int] = {}
        self.moved_cells = 0
        self._plan: Plan | None = None
        self._options: JobOptions | None = None
        self._run_id: str | None = None

    @property
    def num_workers(self) -> int:
        """How many workers share the job."""
        return self._transport.num_workers

    def prepare(self, options: JobOptions) -> dict[str, Any]:
        """Plan the job in a worker process; see `quantlib.job.planner.prepare`.

        Paths are made absolute here: a worker may run in another folder.
        """
        given = {name: getattr(options, name) for name in _ADDRESSES}
        absolute = {name: normalize_uri(uri) for name, uri in given.items() if uri is not None}
        self._options = dataclasses.replace(options, **absolute)
        return self._one("prepare", self._options, self._threads)

    def begin(self) -> dict[str, Any]:
        """Make the work prefix ready, holding its lease; see `quantlib.job.planner.begin`."""
        assert self._options is not None, "prepare(options) comes first"
        return self._one("begin", self._options, self._threads)

    def open(self, plan: Plan, run_id: str | None = None) -> None:
        """Give every worker the plan.

        Args:
            run_id: The run that holds the lease; units are recorded only while it does.
        """
        self._plan, self._run_id = plan, run_id
        self._all("open", plan, run_id)
        self._dispatcher = Dispatcher(self._transport)
        for worker in range(self.num_workers):
            self._dispatcher.join(worker, memory_bytes=0)

    def drop_waiting(self) -> None:
        """Begin nothing of what the stages still want; they end in an error once what is under way has."""
        if self._dispatcher is not None:
            self._dispatcher.drop_waiting()

    def close(self) -> None:
        """Begin nothing any more."""
        if self._dispatcher is not None:
            self._dispatcher.close()

    def renew(self) -> int:
        """Start the workers anew after one was lost; what they held is gone, the plan is given again.

        Returns:
            How many unfinished uploads of the old ones were given up.
        """
        self.close()
        for kept in (self._sources, self._packed, self._statistics, self._loaded, self._homes):
            kept.clear()
        self._transport.renew()
        self.open(self._opened(), self._run_id)
        return self._one("abort_uploads")

    def check_finished(self, records: Sequence[DoneRecord]) -> tuple[dict[str, DoneRecord], dict[str, str]]:
        """Compare finished shards with their records, the workers sharing them; see `BlockRunner`."""
        shares = share_by_cost([record.size_bytes for record in records], self.num_workers)
        handles = [
            self._transport.submit(worker, "check_finished", [records[index] for index in share])
            for worker, share in enumerate(shares)
            if share
        ]
        intact: dict[str, DoneRecord] = {}
        damaged: dict[str, str] = {}
        for handle in handles:
            standing, wrong = self._transport.result(handle)
            intact |= standing
            damaged |= wrong
        return intact, damaged

    def prefetch(self, block: int) -> None:
        """Start reading a block's weights, each worker its part; does nothing past the last block."""
        plan = self._opened()
        if block < len(plan.blocks) and block not in self._sources:
            self._sources[block] = self._read(plan.blocks[block].tensors)

    def prelude(self, units: Sequence[UnitPlan]) -> list[DoneRecord]:
        """Embed every cell and write the units of what stands before the blocks."""
        plan = self._opened()
        names = sorted({n for u in units for n in u.copied} | set(plan.prelude_tensors))
        parts = self._read(names)
        if plan.has_streams:
            self._place_cells(parts)
        return [self._one("write", unit.name, parts) for unit in units]

    def activation_bytes(self) -> int:
        """What a checkpoint of the worker with most activations would hold."""
        return max(self._all("activation_bytes"))

    def save_activations(self, block: int, notes: Mapping[str, Any]) -> ActivationCheckpoint:
        """Keep all streams, which stand before a block.

        Args:
            notes: ``block_errors`` and ``excluded_rows`` of the blocks before.
        """
        plan = self._opened()
        cells = {key: cell for saved in self._all("save_activations", block) for key, cell in saved.items()}
        checkpoint = ActivationCheckpoint(
            identity=plan.identity(),
            evaluation_digest=plan.evaluation_digest,
            block=block,
            cells=cells,
            **notes,
        )
        self._one("complete_checkpoint", checkpoint)
        return checkpoint

    def restore_activations(self, checkpoint: ActivationCheckpoint) -> None:
        """Put all streams where a checkpoint left them; `prelude` has come before."""
        self._all("restore_activations", checkpoint)

    def capture(
        self, block: int, excluded_rows: Sequence[int], after_evaluation: bool = False
    ) -> dict[str, Any]:
        """One forward of every cell through a block: statistics and the next inputs.

        Args:
            excluded_rows: Calibration rows left out in blocks before.
            after_evaluation: Whether the evaluation cells of the block before are still to be compared.
        """
        cells = cells_of(self._opened())
        exponents: list[Sequence[int]] = []
        observers: set[int] = set()

        def begin(worker: int, piece: Piece) -> Handle:
            needs = self._module(worker, "load", block)
            if piece.id.stage == "forward":
                return self._on_cell(worker, piece, "forward", needs)
            observers.add(worker)
            known = exponents[0] if exponents else None
            return self._on_cell(worker, piece, "observe", needs, list(excluded_rows), known)

        def heard(_: Piece, result: Any) -> None:
            if result is not None and result["exponents"] is not None:
                exponents.append(result["exponents"])

        pieces = self._cell_pieces(block, "capture", cells[CALIBRATION])
        waited = "evaluate" if after_evaluation else None
        pieces += self._cell_pieces(block, "forward", cells[EVALUATION], after=waited)
        found = [r for r in self._run(pieces, begin, heard) if r is not None]
        self._take_totals(block, sorted(observers), exponents[0])
        excluded = sorted({row for result in found for row in result["excluded"]}.union(excluded_rows))
        self._refuse_many(excluded)
        return {"excluded_rows": excluded, "tokens": sum(result["tokens"] for result in found)}

    def forward(self, block: int, after_evaluation: bool = False) -> None:
        """Run the original streams through a block without statistics."""
        plan, cells = self._opened(), cells_of(self._opened())
        follows = plan.options["correct_targets"] or plan.options["propagation"] == "original"

        def begin(worker: int, piece: Piece) -> Handle:
            return self._on_cell(worker, piece, "forward", self._module(worker, "load", block))

        pieces = self._cell_pieces(block, "capture", cells[CALIBRATION]) if follows else []
        waited = "evaluate" if after_evaluation else None
        pieces += self._cell_pieces(block, "forward", cells[EVALUATION], after=waited)
        self._run(pieces, begin)

    def solve(self, block: int, tokens: int) -> list[dict[str, Any]]:
        """Quantize a block's linears, an input group at a time; report rows in the plan's order."""
        plan = self._opened().blocks[block]
        self.prefetch(block)
        sources, statistics = self._sources[block], self._statistics.get(block)

        def begin(worker: int, piece: Piece) -> Handle:
            given = statistics[piece.id.part] if statistics is not None else [[], 0]
            return self._transport.submit(worker, "solve", block, piece.id.part, sources, given, tokens)

        pieces = [
            Piece(id=PieceId(block, "solve", number), rank=_rank(block), cost=_solve_cost(plan, group))
            for number, group in enumerate(plan.input_groups)
        ]
        solved = self._run(pieces, begin)
        self._packed[block] = [s["packed"] for s in solved]
        self._statistics.pop(block, None)
        rows = {row["name"]: row for s in solved for row in s["linears"]}
        return [rows[linear.name] for linear in plan.linears if linear.name in rows]

    def write(
        self,
        unit: UnitPlan,
        linears: Sequence[dict[str, Any]],
        excluded_rows: Sequence[int],
        seconds: Mapping[str, float],
    ) -> DoneRecord:
        """Write a block's shard and its record; the arguments after the unit are the record's."""
        assert unit.block is not None
        worker = unit.block % self.num_workers
        handle = self._transport.submit(
            worker,
            "write",
            unit.name,
            [*self._sources[unit.block], *self._packed[unit.block]],
            list(linears),
            list(excluded_rows),
            dict(seconds),
        )
        return self._transport.result(handle)

    def advance(self, block: int) -> dict[str, Any]:
        """Run the quantized streams through a block as it was packed; errors against the original stream."""
        if block not in self._packed:
            # Finished by an earlier start: its codes come from the output.
            packed = self._transport.submit(0, "read_packed", self._opened().block_units[block].name)
            self._transport.result(packed)
            self._packed[block] = [packed]
        cells = cells_of(self._opened())
        packed = self._packed[block]

        def begin(worker: int, piece: Piece) -> Handle:
            needs = self._module(worker, "load_quantized", block, packed)
            return self._on_cell(worker, piece, "advance", needs)

        moved = cells[CALIBRATION] if self._opened().options["propagation"] == "quantized" else []
        pieces = self._cell_pieces(block, "move", moved)
        pieces += self._cell_pieces(block, "evaluate", cells[EVALUATION])
        return _stream_errors([sums for sums in self._run(pieces, begin) if sums is not None])

    def release(self, block: int) -> None:
        """Let go of a block that is written and passed."""
        self._sources.pop(block, None)
        self._packed.pop(block, None)

    def head(self, units: Sequence[UnitPlan]) -> dict[str, Any]:
        """Final norm and head: held-out figures of both streams, and the units of what stands there."""
        plan = self._opened()
        names = {n for u in units for n in u.copied}
        if plan.evaluation_digest is not None:
            names |= set(plan.tail_tensors)
        parts = self._read(sorted(names)) if names else []
        figures = None
        if plan.evaluation_digest is not None:
            loaded = [
                self._transport.submit(worker, "load_head", parts) for worker in range(self.num_workers)
            ]
            self._loaded.clear()

            def begin(worker: int, piece: Piece) -> Handle:
                return self._on_cell(worker, piece, "score", loaded[worker])

            figures = self._run(
                self._cell_pieces(len(plan.blocks), "score", cells_of(plan)[EVALUATION]), begin
            )
        records = [self._one("write", unit.name, parts) for unit in units]
        return {"figures": figures, "records": records}

    def convert_unit(self, unit: UnitPlan) -> DoneRecord:
        """Read, quantize and write one unit in one go, for methods that need no activations."""
        number = self._opened().units.index(unit)

        def begin(worker: int, _: Piece) -> Handle:
            return self._transport.submit(worker, "convert_unit", unit.name)

        return self._run([Piece(id=PieceId(number, "unit", 0), rank=number)], begin)[0]

    def publish(self, report: dict[str, Any]) -> None:
        """Side files and report, then the index, then config.json."""
        self._one("publish", report)

    def telemetry(self) -> list[dict[str, Any]]:
        """Seconds, traffic and peak memory of every worker."""
        return self._all("telemetry")

    def _opened(self) -> Plan:
        assert self._plan is not None, "open(plan) comes first"
        return self._plan

    def _run(
        self,
        pieces: Sequence[Piece],
        begin: Callable[[int, Piece], Handle],
        heard: Callable[[Piece, Any], None] = lambda *_: None,
    ) -> list[Any]:
        assert self._dispatcher is not None, "open(plan) comes first"
        try:
            return self._dispatcher.run(pieces, begin, heard)
        except QuantError:
            # What could not be read is read anew when the stage is tried again.
            for block in {piece.id.block for piece in pieces}:
                self._sources.pop(block, None)
            self._loaded.clear()
            raise

    def _place_cells(self, parts: Sequence[Handle]) -> None:
        """Deal the cells out to the workers like cards; each embeds its own."""
        shares = {
            worker: [
                key for keys in cells_of(self._opened()).values() for key in keys[worker :: self.num_workers]
            ]
            for worker in range(self.num_workers)
        }
        for handle in [self._transport.submit(w, "embed", parts, keys) for w, keys in shares.items()]:
            self._transport.result(handle)
        self._homes = {key: worker for worker, keys in shares.items() for key in keys}

    def _cell_pieces(
        self, block: int, stage: str, keys: Sequence[str], after: str | None = None
    ) -> list[Piece]:
        """A piece for every cell, numbered as the cells are.

        Args:
            after: Stage of the block before in which the same cell comes first.
        """
        return [
            Piece(
                id=PieceId(block, stage, number),
                rank=_rank(block),
                home=self._homes[key],
                after=frozenset() if after is None else frozenset({PieceId(block - 1, after, number)}),
            )
            for number, key in enumerate(keys)
        ]

    def _on_cell(self, worker: int, piece: Piece, method: str, needs: Handle, *arguments: Any) -> Handle:
        """Have a worker do something with a piece's cell, which is brought there if another one has it.

        Args:
            needs: Of what must have gone well before; the handle that is given raises its error too.
        """
        corpus = EVALUATION if piece.id.stage in _OF_EVALUATION else CALIBRATION
        key, needed = cells_of(self._opened())[corpus][piece.id.part], [needs]
        home = self._homes[key]
        if home != worker:
            streams = self._transport.submit(home, "give", key)
            needed.append(self._transport.submit(worker, "take", key, streams))
            self._homes[key] = worker
            self.moved_cells += 1
        return self._transport.submit(worker, method, piece.id.block, key, needed, *arguments)

    def _module(self, worker: int, method: str, block: int, *arguments: Any) -> Handle:
        """Have a worker make a block live, unless it has; whoever is given the handle raises its error."""
        loaded, handle = self._loaded.get((worker, method), (None, None))
        if loaded != block:
            self.prefetch(block)
            handle = self._transport.submit(worker, method, block, self._sources[block], *arguments)
            self._loaded[worker, method] = (block, handle)
        return handle

    def _take_totals(self, block: int, observers: Sequence[int], exponents: Sequence[int]) -> None:
        """Have the observers share their sums: for every input group what `GroupSolver.solve` wants."""
        handles = [self._transport.submit(worker, "totals", block, exponents) for worker in observers]
        by_worker = [self._transport.result(handle) for handle in handles]
        num_groups = len(self._opened().blocks[block].input_groups)
        given: list[list[Any]] = [[] for _ in range(num_groups)]
        for number, exponent in enumerate(exponents):
            given[number % num_groups] += [[totals[number] for totals in by_worker], exponent]
        self._statistics[block] = given

    def _read(self, names: Sequence[str]) -> list[Handle]:
        workers = range(self.num_workers)
        return [self._transport.submit(w, "read", list(names), w, self.num_workers) for w in workers]

    def _one(self, method: str, *arguments: Any) -> Any:
        return self._transport.result(self._transport.submit(0, method, *arguments))

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        handles = [self._transport.submit(w, method, *arguments) for w in range(self.num_workers)]
        return [self._transport.result(handle) for handle in handles]

    def _refuse_many(self, excluded_rows: Sequence[int]) -> None:
        num_rows = self._opened().options["sequences"]
        if len(excluded_rows) > MAX_EXCLUDED_SHARE * num_rows:
            raise NumericsError(
                f"{len(excluded_rows)} of {num_rows} calibration rows give non-finite activations,"
                f" more than {MAX_EXCLUDED_SHARE:.0%}; check the checkpoint, or calibrate on other text",
                rows=list(excluded_rows),
            )


def _rank(block: int) -> int:
    """What belongs to an earlier block goes first."""
    return block


def share_by_cost(costs: Sequence[float], num_workers: int) -> list[list[int]]:
    """Indices for every worker, the dearest first to whoever has least; each worker's in rising order.

    >>> share_by_cost([5.0, 1.0, 3.0, 3.0], 2)
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0.0] * num_workers
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        worker = loads.index(min(loads))
        shares[worker].append(index)
        loads[worker] += costs[index]
    return [sorted(share) for share in shares]


def _solve_cost(block: BlockPlan, group: Sequence[str]) -> float:
    linears = [linear for linear in block.linears if linear.name in group]
    columns = linears[0].columns
    return columns**3 / 3 + sum(linear.rows for linear in linears) * columns**2


def _stream_errors(cells: Sequence[dict[str, float]]) -> dict[str, Any]:
    if not cells:
        return {"relative_error": None, "cosine": None}
    error, original, quantized, product = (
        sum(cell[name] for cell in cells) for name in ("error", "original", "quantized", "product")
    )
    if not math.isfinite(error):
        # JSON has no word for it; the perplexity at the end says what became of the model.
        return {"relative_error": None, "cosine": None}
    return {
        "relative_error": error / original if original else 0.0,
        "cosine": product / (original * quantized) ** 0.5 if original and quantized else 1.0,
    }
