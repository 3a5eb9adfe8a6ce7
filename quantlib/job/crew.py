"""The workers of one job: what each stage of the conversion has them do, and what is told of it.

Each public method is one stage. Tensors travel from worker to worker behind handles, never through this
object.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantlib.errors import NumericsError, QuantError, WorkerLostError
from quantlib.job.activations import ActivationCheckpoint
from quantlib.job.bands import MAX_DIRECT_BATCHES, cut_into_bands, sum_shapes
from quantlib.job.block_parts import BlockParts
from quantlib.job.bundle import Bundle, bundle_of
from quantlib.job.cell_streams import CellStreams, after_first_cell, key_of
from quantlib.job.dispatch import Dispatcher
from quantlib.job.expert_groups import TokenCounts, readers_of
from quantlib.job.holdings import Held, Holdings, OutputHoldings
from quantlib.job.manifest import DoneRecord
from quantlib.job.memory import MemoryPlan, Surroundings, budgets_from, heap_bytes, plan_memory
from quantlib.job.options import JobOptions
from quantlib.job.output_solve import OutputSolve
from quantlib.job.plan import Groups, UnitPlan
from quantlib.job.reduction import Batch, Reduction
from quantlib.job.schedule import Piece, PieceId
from quantlib.job.shares import share_by_cost
from quantlib.job.solve_pieces import solve_pieces
from quantlib.job.text_sources import with_addresses
from quantlib.job.transport import Handle, Transport, ask_all, ask_one, results
from quantlib.storage import normalize_uri

# Place of the sums over all experts' tokens beside those of X^T X and X_ref^T X.
_POOL = 2
_ADDRESSES = ("source", "output", "work", "evaluation")

# Calibration rows whose activations overflow are left out; with more of them than this the model or the
# text is at fault and codes fitted to the rest would be worth little.
MAX_EXCLUDED_SHARE = 0.1


class Crew:
    """All workers of one job, driven stage by stage.

    Args:
        transport: How to reach the workers.
        threads: CPU threads a worker has.
    """

    def __init__(self, transport: Transport, threads: int) -> None:
        self._transport = transport
        self._threads = threads
        self._requests: list[JobOptions] = []
        self._memory: MemoryPlan | None = None
        self._plans: tuple[Bundle, str | None] | None = None
        self._job: _Job | None = None
        self._num_moved = 0
        self._reduction = Reduction(transport)

    @property
    def num_workers(self) -> int:
        """How many workers share the job."""
        return len(self._transport.workers)

    @property
    def moved_cells(self) -> int:
        """How often a worker that had nothing to do took over a cell of a busy one."""
        return self._num_moved + (self._job.cells.num_moved if self._job else 0)

    @property
    def exchanges(self) -> dict[str, int]:
        """By which way the sums of the observers met -> of how many slices of blocks."""
        return dict(self._reduction.paths)

    @property
    def exchange_fallbacks(self) -> list[str]:
        """Why sums went through the object store from node to node, each time that was decided."""
        return list(self._reduction.fallbacks)

    @property
    def positions(self) -> set[int]:
        """Blocks before which some stream stands."""
        return self._opened.cells.positions

    @property
    def awaits_workers(self) -> bool:
        """Whether workers are there that do not take part yet."""
        return self._transport.has_newcomers

    def prepare(self, requests: Sequence[JobOptions]) -> dict[str, Any]:
        """Plan outputs of one source in a worker process; see `quantlib.job.planner.prepare_all`.

        Paths are made absolute here: a worker may run in another folder.

        Returns:
            ``plans``; the ``reports`` of those outputs that are finished, the others being None; ``bundle``
            and ``memory`` of these others, None where nothing is left.
        """
        self._requests = [_with_absolute_paths(options) for options in requests]
        prepared = self._one("prepare", self._requests, self._threads)
        plans, reports = prepared["plans"], prepared["reports"]
        left = [plan for plan, report in zip(plans, reports, strict=True) if report is None]
        if not left:
            return {"plans": plans, "reports": reports, "bundle": None, "memory": None}
        bundle, options = bundle_of(left), self._requests[0]
        room = dataclasses.replace(self._transport.room, device_bytes=prepared["device_bytes"])
        surroundings = Surroundings(
            workers=self.num_workers,
            idle_bytes=prepared["idle_bytes"],
            kept_bytes=heap_bytes(bundle, options),
            has_device=bundle.shared.device_kind.startswith("cuda"),
            store_workers=room.store_workers,
        )
        self._memory = plan_memory(bundle, surroundings, budgets_from(options, room))
        return {"plans": plans, "reports": reports, "bundle": bundle, "memory": self._memory}

    def begin(self) -> dict[str, Any]:
        """Make the work prefixes ready, holding their leases; see `quantlib.job.planner.begin`."""
        assert self._requests, "prepare(requests) comes first"
        return self._one("begin", self._requests, self._threads)

    def open(self, bundle: Bundle, run_id: str | None = None) -> None:
        """Give every worker the plans.

        Args:
            run_id: The run that holds the leases; units are recorded only while it does.
        """
        self._plans = (bundle, run_id)
        memory = self._memory
        assert memory is not None, "prepare(requests) comes first"
        self._all("open", bundle, run_id, memory.activation_bytes, memory.has_late_weights)
        self._job = _Job(self._transport, bundle, run_id, memory)
        self._job.employ(self._transport.workers)

    def drop_waiting(self) -> None:
        """Begin nothing of what the stages still want; they end in an error once what is under way has."""
        if self._job is not None:
            self._job.dispatcher.drop_waiting()

    def close(self) -> None:
        """Begin nothing any more."""
        if self._job is not None:
            self._job.dispatcher.close()

    def renew(self) -> None:
        """Start the workers anew after one was lost; what they held is gone, the plan is given again."""
        assert self._plans is not None, "open(bundle) comes first"
        self._reduction.forget_groups()
        if self._job is not None:
            self._job.dispatcher.close()
            self._num_moved += self._job.cells.num_moved
            self._job = None
        self._transport.renew()
        self.open(*self._plans)

    def carry_on(self) -> bool:
        """Go on with the workers that are left; what the lost ones held is brought up again by `prelude`.

        Returns:
            False when that cannot be done, as nobody is left, or nobody is gone that is known of: `renew`.
        """
        self._reduction.forget_groups()
        job, gone = self._job, self._transport.drop_lost()
        if job is None or not gone or not self._transport.workers:
            return False
        job.dispatcher.close()
        job.holdings.lose(gone)
        job.cells.forget_dealt()
        job.dispatcher = Dispatcher(self._transport)
        job.statistics.clear()
        job.parts.read_anew(())
        for worker in self._transport.workers:
            kept = [key for key, home in job.holdings.homes.items() if home == worker]
            self._transport.submit(worker, "keep_cells", kept)
        job.employ(self._transport.workers)
        return True

    def abort_uploads(self) -> int:
        """Give up what lost workers were writing, and tell how many uploads; nobody may be writing."""
        return self._one("abort_uploads")

    def welcome(self) -> tuple[int, list[str]]:
        """Have workers that came meanwhile take part from now on.

        Returns:
            How many; and what was wrong with others, which are sent away: the job can do without them. Where
            some worker was lost meanwhile, perhaps an old one, others may come in their place.
        """
        job, came, problems = self._opened, self._transport.newcomers(), []
        given = (job.memory.activation_bytes, job.memory.has_late_weights)
        calls: list[tuple[Any, ...]] = [("open", job.bundle, job.run_id, *given)]
        if came and job.bundle.has_streams:
            calls.append(("embed", job.parts.read(job.plan.prelude_tensors), []))
        for call in calls:
            handles = {worker: self._transport.submit(worker, *call) for worker in came}
            for worker, handle in handles.items():
                try:
                    self._transport.result(handle)
                except QuantError as error:
                    problems.append(error.message)
                    came.remove(worker)
                    is_lost = isinstance(error, WorkerLostError)
                    self._transport.send_away([worker], for_good=not is_lost)
        self._transport.take_in(came)
        job.employ(came)
        return len(came), problems

    def check_finished(
        self, output: int, records: Sequence[DoneRecord]
    ) -> tuple[dict[str, DoneRecord], dict[str, str]]:
        """Compare finished shards with their records, the workers sharing them; see `BlockRunner`."""
        shares = share_by_cost([record.size_bytes for record in records], self.num_workers)
        handles = [
            self._transport.submit(worker, "check_finished", output, [records[index] for index in share])
            for worker, share in zip(self._transport.workers, shares, strict=True)
            if share
        ]
        intact: dict[str, DoneRecord] = {}
        damaged: dict[str, str] = {}
        for standing, wrong in results(self._transport, handles):
            intact |= standing
            damaged |= wrong
        return intact, damaged

    def prefetch(self, block: int) -> None:
        """Start reading a block's weights, each worker its part; does nothing past the last block."""
        self._opened.parts.prefetch(block)

    def bring_ahead(self, block: int) -> None:
        """Start bringing a block's weights to the workers' devices, if the memory plan has room for them."""
        if self._opened.memory.brings_ahead:
            self._opened.parts.bring_ahead(block)

    def prelude(self, units: Sequence[Sequence[UnitPlan]]) -> list[list[DoneRecord]]:
        """Embed the cells that nobody has, and write the units of what stands before the blocks.

        Args:
            units: Of every output.
        """
        job = self._opened
        names = {n for mine in units for u in mine for n in u.sources}
        names |= set(job.plan.prelude_tensors) if job.cells.missing else set()
        parts = job.parts.read(names) if names else []
        if job.cells.missing:
            job.cells.deal(parts)
        return self._written(units, parts)

    def activation_bytes(self) -> int:
        """What a checkpoint of the worker with most activations would hold."""
        return max(self._all("activation_bytes"))

    def save_activations(self, block: int, notes: Mapping[str, Any]) -> ActivationCheckpoint:
        """Keep all streams, which stand before a block.

        Args:
            notes: ``block_errors`` and ``excluded_rows`` of the blocks before.
        """
        bundle = self._opened.bundle
        cells = {key: cell for saved in self._all("save_activations", block) for key, cell in saved.items()}
        checkpoint = ActivationCheckpoint(
            identities=tuple(plan.identity() for plan in bundle.outputs),
            evaluation_digest=bundle.shared.evaluation_digest,
            block=block,
            cells=cells,
            **notes,
        )
        self._one("complete_checkpoint", checkpoint)
        return checkpoint

    def restore_activations(self, checkpoint: ActivationCheckpoint) -> None:
        """Put the streams that `prelude` has embedded where a checkpoint left them."""
        self._opened.cells.restore(checkpoint)

    def give_up_restoring(self) -> None:
        """Have `prelude` embed those cells anew."""
        self._opened.cells.give_up_restoring()

    def passes(self, block: int, outputs: Sequence[int]) -> list[Groups]:
        """Input groups that are summed and solved together, each time in a pass over all cells.

        Those that are packed are left out, but for the last ones: with them the streams go on.

        Args:
            outputs: For which the block is to be quantized.
        """
        *others, last = self._opened.memory.slices[block]
        is_solved = self._opened.parts.is_solved
        return [*(groups for groups in others if not is_solved(block, groups, outputs)), last]

    def capture(
        self,
        block: int,
        outputs: Sequence[int],
        groups: Groups,
        excluded_rows: Sequence[int],
        after_evaluation: bool = False,
    ) -> dict[str, Any]:
        """One forward of every cell through a block: statistics and, in the last pass, the next inputs.

        Args:
            outputs: For which the block is to be quantized.
            groups: One of `passes`.
            excluded_rows: Calibration rows left out so far.
            after_evaluation: Whether the evaluation cells of the block before are still to be compared.
        """
        job, held = self._opened, self._opened.holdings
        is_last = groups == job.memory.slices[block][-1]
        if job.parts.is_solved(block, groups, outputs):
            # It is all there but for its shard: only streams that were lost are left to move.
            self.forward(block, after_evaluation)
            return held.captured[block]
        observed = held.observed.setdefault(block, {}).setdefault(groups, {})
        exponents = held.exponents.setdefault(block, {})

        def begin(worker: int, piece: Piece) -> Handle:
            needs = job.parts.live(worker, "load", block)
            if piece.id.stage == "forward" or key_of(piece) in observed:
                return job.cells.begin(worker, piece, "forward", needs)
            known = exponents.get(groups)
            arguments = (groups, list(excluded_rows), known, is_last)
            return job.cells.begin(worker, piece, "observe", needs, *arguments)

        def heard(worker: int, piece: Piece, result: Any) -> None:
            key = key_of(piece)
            if result is not None:
                observed[key] = Held(worker, None, result)
                if result["exponents"] is not None:
                    exponents[groups] = result["exponents"]
            if is_last and job.cells.follows(key):
                held.follows[key] = block + 1

        moves = [key for key in job.cells.calibration if is_last and job.cells.stands(key, block)]
        wanted = [key for key in job.cells.calibration if key not in observed or key in moves]
        pieces = job.cells.pieces(block, "capture", wanted)
        if groups not in exponents:
            pieces = after_first_cell(pieces)
        if is_last:
            pieces += job.cells.forwards(block, after_evaluation=after_evaluation)
        job.run(pieces, begin, heard)
        job.parts.unload(block)
        told = [cell.told for cell in observed.values()]
        excluded = sorted({row for result in told for row in result["excluded"]}.union(excluded_rows))
        self._refuse_many(excluded)
        self._take_totals(block, groups)
        held.captured[block] = {"excluded_rows": excluded, "tokens": TokenCounts.over(told)}
        return held.captured[block]

    def forward(self, block: int, after_evaluation: bool = False) -> None:
        """Run the original streams through a block without statistics."""
        job = self._opened

        def begin(worker: int, piece: Piece) -> Handle:
            return job.cells.begin(worker, piece, "forward", job.parts.live(worker, "load", block))

        def heard(_: int, piece: Piece, __: Any) -> None:
            job.holdings.follows[key_of(piece)] = block + 1

        standing = [key for key in job.cells.calibration if job.cells.stands(key, block)]
        pieces = job.cells.pieces(block, "capture", standing)
        job.run(pieces + job.cells.forwards(block, after_evaluation=after_evaluation), begin, heard)
        job.parts.unload(block)

    def solve(
        self, block: int, outputs: Sequence[int], groups: Groups, counts: TokenCounts
    ) -> dict[int, list[dict[str, Any]]]:
        """Quantize the linears of some input groups, a row tile at a time; once for outputs of equal codes.

        Args:
            outputs: For which it is to be done.
            groups: Shared ones.
            counts: ``tokens`` of `capture`.

        Returns:
            Output -> report rows of all that are quantized by now, in its plan's order.
        """
        job = self._opened
        shared = (job.bundle, job.holdings, job.parts)
        statistics = job.statistics.get(block, {})
        alike: dict[int, list[int]] = {}
        for output in outputs:
            alike.setdefault(job.bundle.solvers[output], []).append(output)
        solves = {
            first: OutputSolve(*shared, first, others, block, groups, statistics, counts)
            for first, *others in alike.values()
        }

        def begin(worker: int, piece: Piece) -> Handle:
            groups = shared_out.groups.get(piece.id)
            return self._transport.submit(worker, *solves[piece.id.output].call(piece.id, groups))

        def heard(worker: int, piece: Piece, result: Any) -> None:
            solves[piece.id.output].heard(worker, piece.id, shared_out.groups.get(piece.id), result)

        has_batches = job.memory.has_batches
        works = [work for solve in solves.values() for work in solve.works(has_batches=has_batches)]
        shared_out = solve_pieces(block, works, self._transport.workers)
        try:
            job.run(shared_out.pieces, begin, heard)
        finally:
            if any(work.is_cut for work in works):
                for worker in self._transport.workers:
                    self._transport.submit(worker, "forget_prepared")
        job.statistics.pop(block, None)
        if self.num_workers == 1 or len(job.memory.slices[block]) > 1:
            # Several workers keep them until the shard is finished, where one pass gives them all: codes that
            # are lost can be made again.
            job.holdings.observed.get(block, {}).pop(groups, None)
            self._forget_totals(block, groups)
        return {output: rows for solve in solves.values() for output, rows in solve.report_rows().items()}

    def write(
        self,
        output: int,
        unit: UnitPlan,
        linears: Sequence[dict[str, Any]],
        excluded_rows: Sequence[int],
        seconds: Mapping[str, float],
    ) -> DoneRecord:
        """Write a block's shard and its record; the arguments after the unit are the record's."""
        assert unit.block is not None
        parts, workers = self._opened.parts, self._transport.workers
        handle = self._transport.submit(
            workers[unit.block % len(workers)],
            "write",
            output,
            unit.name,
            [*parts.sources(unit.block), *parts.packed(output, unit.block)],
            list(linears),
            list(excluded_rows),
            dict(seconds),
        )
        return self._transport.result(handle)

    def advance(self, block: int) -> list[dict[str, Any] | None]:
        """Run the quantized streams through a block as it was packed, those of one output after another's.

        Returns:
            Of every output errors against the original stream; None when only streams that were lost were
            brought up again.
        """
        job = self._opened
        errors = [self._advance(block, output) for output in range(len(job.bundle.outputs))]
        job.parts.unload(block)
        return errors

    def _advance(self, block: int, output: int) -> dict[str, Any] | None:
        job, packed = self._opened, self._opened.parts.packed(output, block)
        held = job.holdings.outputs[output]
        compared = held.compared.setdefault(block, {})

        def begin(worker: int, piece: Piece) -> Handle:
            needs = job.parts.live(worker, "load_quantized", block, packed, output, output=output)
            return job.cells.begin(worker, piece, "advance", needs, output)

        def heard(_: int, piece: Piece, result: Any) -> None:
            held.quantized[key_of(piece)] = block + 1
            if result is not None:
                compared[key_of(piece)] = result

        pieces: list[Piece] = []
        for stage, keys in (("move", job.cells.calibration), ("evaluate", job.cells.evaluation)):
            waiting = [key for key in keys if job.cells.waits(key, block, output)]
            pieces += job.cells.pieces(block, stage, waiting, output)
        job.run(pieces, begin, heard)
        if len(compared) < len(job.cells.evaluation):
            return None
        return _stream_errors([compared[key] for key in sorted(compared)])

    def release(self, block: int) -> None:
        """Let go of a block that is written and passed."""
        self._opened.holdings.release(block)
        self._forget_totals(block)

    def head(self, units: Sequence[Sequence[UnitPlan]]) -> dict[str, Any]:
        """Final norm and head: held-out figures of all streams, and the units of what stands there.

        Args:
            units: Of every output.

        Returns:
            Of every output ``figures``, or None for all without evaluation; ``records`` of its units.
        """
        job, plan = self._opened, self._opened.plan
        names = {n for mine in units for u in mine for n in u.sources}
        if plan.evaluation_digest is not None:
            names |= set(plan.tail_tensors)
        parts = job.parts.read(names) if names else []
        figures = None
        if plan.evaluation_digest is not None:

            def begin(worker: int, piece: Piece) -> Handle:
                return job.cells.begin(worker, piece, "score", job.parts.live_head(worker, parts))

            scores = job.run(job.cells.pieces(len(plan.blocks), "score", job.cells.evaluation), begin)
            figures = [list(cells) for cells in zip(*scores, strict=True)]
        return {"figures": figures, "records": self._written(units, parts)}

    def convert_unit(self, unit: UnitPlan) -> DoneRecord:
        """Read, quantize and write one unit, for methods that need no activations.

        The worker is free for the next unit while it still writes.
        """
        number = self._opened.plan.units.index(unit)
        writing: list[Handle] = []

        def begin(worker: int, _: Piece) -> Handle:
            return self._transport.submit(worker, "convert_unit", unit.name)

        def heard(worker: int, _: Piece, __: Any) -> None:
            writing.append(self._transport.submit(worker, "finish_unit", unit.name))

        self._opened.run([Piece(id=PieceId(number, "unit", 0), rank=number)], begin, heard)
        return self._transport.result(writing[0])

    def stage(self, reports: Sequence[dict[str, Any]]) -> None:
        """Of every output what will lie beside the shards, and the report; see `quantlib.job.staging`."""
        self._one("stage", reports)

    def telemetry(self) -> list[dict[str, Any]]:
        """Seconds, traffic and peak memory of every worker."""
        return self._all("telemetry")

    @property
    def _opened(self) -> "_Job":
        assert self._job is not None, "open(bundle) comes first"
        return self._job

    def _one(self, method: str, *arguments: Any) -> Any:
        return ask_one(self._transport, method, *arguments)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return ask_all(self._transport, method, *arguments)

    def _written(self, units: Sequence[Sequence[UnitPlan]], parts: list[Handle]) -> list[list[DoneRecord]]:
        """Units of copied tensors, of every output."""
        return [
            [self._one("write", output, unit.name, parts) for unit in mine]
            for output, mine in enumerate(units)
        ]

    def _take_totals(self, block: int, groups: Groups) -> None:
        """Have the observers share their sums, and others add them: what `BlockRunner.solve` wants."""
        job, held = self._opened, self._opened.holdings
        exponents = held.exponents[block][groups]
        observed = held.observed[block][groups]
        observers = sorted({cell.worker for cell in observed.values()})
        submit = self._transport.submit
        # As they were cut first: what is kept of them fits what is observed anew after a loss.
        bands = held.bands.setdefault(block, {}).setdefault(
            groups,
            cut_into_bands(
                sum_shapes(job.plan, block, groups),
                self.num_workers if len(observers) > MAX_DIRECT_BATCHES else 1,
            ),
        )
        handles = [submit(worker, "totals", block, groups, exponents, bands) for worker in observers]
        batches: list[Batch] = []
        for worker, found in zip(observers, results(self._transport, handles), strict=True):
            told = sorted(key for key, cell in observed.items() if cell.worker == worker)
            if sorted(key for _, keys in found for key in keys) != told:
                raise WorkerLostError(
                    f"worker {worker} was to have summed {told} in block {block} and has summed others",
                    worker=worker,
                )
            batches += [Batch(worker, shared) for shared, _ in found]
        given: dict[int, list[list[list[Handle]]]] = {group: [[], [], []] for group in groups}
        pools = readers_of(job.plan, job.plan.blocks[block]).pools
        pooled: dict[int, list[int]] = {}
        for group in groups:
            if group in pools:
                pooled.setdefault(pools[group], []).append(group)
        shapes = sum_shapes(job.plan, block, groups)
        for sums in self._reduction.merged(bands, batches):
            parts: list[list[Handle]] = [[] for _ in shapes]
            for band, sum_ in zip(bands, sums, strict=True):
                parts[band.total].append(sum_)
            for shape, mine in zip(shapes, parts, strict=True):
                if shape.reader in given:
                    given[shape.reader][shape.is_whole].append(mine)
                for group in pooled.get(shape.reader, ()):
                    given[group][_POOL].append(mine)
        job.statistics[block] = given

    def _forget_totals(self, block: int, groups: Groups | None = None) -> None:
        for worker in self._transport.workers:
            self._transport.submit(worker, "forget_totals", block, groups)

    def _refuse_many(self, excluded_rows: Sequence[int]) -> None:
        num_rows = self._opened.plan.options["sequences"]
        if len(excluded_rows) > MAX_EXCLUDED_SHARE * num_rows:
            raise NumericsError(
                f"{len(excluded_rows)} of {num_rows} calibration rows give non-finite activations,"
                f" more than {MAX_EXCLUDED_SHARE:.0%}; check the checkpoint, or calibrate on other text",
                rows=list(excluded_rows),
            )


def _with_absolute_paths(options: JobOptions) -> JobOptions:
    given = {name: getattr(options, name) for name in _ADDRESSES}
    absolute = {name: normalize_uri(uri) for name, uri in given.items() if uri is not None}
    if options.calibration is not None:
        absolute["calibration"] = with_addresses(options.calibration, normalize_uri)
    return dataclasses.replace(options, **absolute)


class _Job:
    """Plans, and what their workers have and do."""

    def __init__(self, transport: Transport, bundle: Bundle, run_id: str | None, memory: MemoryPlan) -> None:
        self.bundle, self.run_id, self.memory = bundle, run_id, memory
        self.plan = bundle.shared
        self.holdings = Holdings(outputs=[OutputHoldings(sums=sums) for sums in bundle.sums])
        self.parts = BlockParts(transport, bundle, self.holdings)
        self.cells = CellStreams(transport, bundle, self.holdings)
        # Block -> input group -> kind of sum -> totals that are to be added -> handles of their bands.
        self.statistics: dict[int, dict[int, list[list[list[Handle]]]]] = {}
        self.dispatcher = Dispatcher(transport)

    def employ(self, workers: Sequence[int]) -> None:
        """Let workers, which have the plan, take part."""
        for worker in workers:
            self.dispatcher.join(worker, memory_bytes=0)

    def run(
        self,
        pieces: Sequence[Piece],
        begin: Callable[[int, Piece], Handle],
        heard: Callable[[int, Piece, Any], None] = lambda *_: None,
    ) -> list[Any]:
        """Have pieces done; see `Dispatcher.run`."""

        def told(worker: int, piece: Piece, result: Any) -> None:
            self.cells.ended(piece)
            heard(worker, piece, result)

        try:
            return self.dispatcher.run(pieces, begin, told)
        except QuantError:
            self.parts.read_anew({piece.id.block for piece in pieces})
            raise


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
