"""One worker's share of a job: its cells of activations, and the steps of a block upon them.

The same class serves in this process and inside a Ray actor. It keeps the hidden states of its cells and the
block being worked on; everything else comes in as arguments and goes out as small values or, through
``share``, as tensors other workers may ask for.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from quantlib.block_statistics import BlockStatistics
from quantlib.calibration.totals import BandSum, Total
from quantlib.cells import quantized_name
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.cholesky import CHOLESKYS
from quantlib.cholesky_check import CholeskyCheck, checked_choleskys
from quantlib.errors import WorkerError
from quantlib.group_solver import TileRows
from quantlib.job import activations, planner
from quantlib.job.activations import ActivationCheckpoint
from quantlib.job.bands import Band
from quantlib.job.bundle import Bundle
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.group_tiles import GroupTile
from quantlib.job.manifest import DoneRecord, device_kinds, record_device_kind
from quantlib.job.options import JobOptions
from quantlib.job.plan import Groups
from quantlib.machine import device_bytes, keep_fp32_products, refuse_other_device
from quantlib.memory_watch import (
    give_back_free_memory,
    give_back_what_is_freed,
    memory_bytes,
    peak_memory_bytes,
    watch_memory,
)
from quantlib.methods import METHODS, methods_with
from quantlib.model.late_weights import LateWeight, stored_weight
from quantlib.model.skeleton import Skeleton, load_skeleton
from quantlib.rounded_ends import Ends, live_ends
from quantlib.schemes import ActivationScheme
from quantlib.solver_settings import FROM_EXTREMES
from quantlib.stage_clock import StageClock
from quantlib.steps import input_schemes, score_streams, stream_error
from quantlib.storage import open_store
from quantlib.stream_shelf import Shelf
from quantlib.sum_exchange import SumExchange
from quantlib.weights_ahead import WeightsAhead
from quantlib.worker_cells import WorkerCells, following_stream
from quantlib.worker_output import WorkerOutput

_LOG = logging.getLogger(__name__)
Tensors = Mapping[str, torch.Tensor]

_ORIGINAL, _QUANTIZED = "original", "quantized"
# Streams that a cell is observed with.
_OBSERVED = ("main", "reference")
# Rows of a tile that no linear reaches.
_WHOLE_LINEARS = 1 << 62


class BlockRunner:
    """A worker. Outputs that are made together are known by their numbers in the bundle of the job.

    Args:
        share: Makes a value available to other workers; in one process the value itself.
        host: Address of this machine that the other workers' machines reach.
        memory_in_use: Tells bytes that this worker takes; of its process unless it shares that with others.
        check_choleskys: Finds a way to make factors of so many columns on a GPU.
    """

    def __init__(
        self,
        share: Callable[[Any], Any] = lambda value: value,
        host: str = "127.0.0.1",
        memory_in_use: Callable[[], int] = memory_bytes,
        check_choleskys: Callable[[int, torch.device], CholeskyCheck] = checked_choleskys,
    ) -> None:
        self._share, self._memory_in_use, self._check_choleskys = share, memory_in_use, check_choleskys
        self._sums = SumExchange(share, host)
        self._stopped = threading.Event()
        self._clock = StageClock()
        self._prepared: list[planner.Prepared] | None = None
        self._modules: dict[str, tuple[int, nn.Module]] = {}
        self._heads: Ends | None = None
        watch_memory()

    def prepare(self, requests: Sequence[JobOptions], threads: int) -> dict[str, Any]:
        """Plan the outputs of a job; see `quantlib.job.planner.prepare_all`."""
        with self._clock.computing("plan"):
            self._prepared = planner.prepare_all(requests, threads)
            # What tracing the model and tokenizing took would count as idle for the whole job.
            give_back_free_memory()
            device_kind = self._prepared[0].plan.device_kind
            return {
                "plans": [prepared.plan for prepared in self._prepared],
                "reports": [prepared.report for prepared in self._prepared],
                "idle_bytes": self._memory_in_use(),
                "device_bytes": device_bytes(device_kind),
            }

    def begin(self, requests: Sequence[JobOptions], threads: int) -> dict[str, Any]:
        """Make the work prefixes ready, holding their leases; see `quantlib.job.planner.begin`."""
        with self._clock.computing("plan"):
            # Another worker than the one that planned: it plans for itself.
            prepared = self._prepared or planner.prepare_all(requests, threads)
            self._prepared = None
            return planner.begin([found for found in prepared if found.report is None])

    def open(
        self,
        bundle: Bundle,
        run_id: str | None = None,
        activation_bytes: int | None = None,
        has_late_weights: bool = False,
    ) -> None:
        """Take up the plans of a job.

        Args:
            run_id: The run that holds the leases of the work prefixes; see `WorkerOutput`.
            activation_bytes: What of the streams may be in memory; None for all.
            has_late_weights: Whether the linears of a live block make their weights when they run.

        Raises:
            PlanMismatchError: This worker's device is of another kind than the plan's, which is not allowed.
            DeviceError: A GPU does not make right factors in any way.
        """
        plan = bundle.shared
        kind = refuse_other_device(plan.device_kind, mixed_gpus=plan.options["mixed_gpus"])
        # One thread rounds as fast as a client reads; more would spin on the cores that storage needs.
        is_light = not bundle.has_streams and plan.options["scale_search"] in FROM_EXTREMES
        torch.set_num_threads(1 if is_light else plan.threads)
        keep_fp32_products()
        if plan.options["worker_memory"] is not None:
            give_back_what_is_freed()
        self._has_late_weights = has_late_weights
        self._plan = plan
        self._device = torch.device("cuda" if plan.device_kind.startswith("cuda") else "cpu")
        self._cholesky_check = self._checked_choleskys(bundle)
        check = self._cholesky_check
        methods = METHODS if check is None else methods_with(CHOLESKYS[check.way])
        self._dtype: torch.dtype = getattr(torch, plan.compute_dtype)
        engine = plan.options["storage_engine"]
        self._source_store = open_store(plan.source, engine)
        self._work_store = open_store(plan.work, engine)
        self._checkpoint: Checkpoint = planner.open_planned_source(self._source_store, plan)
        self._skeleton: Skeleton = load_skeleton(self._checkpoint.config, list(self._checkpoint.tensors))
        self._weights = WeightsAhead(self._device)
        self._shelf = Shelf(activation_bytes)
        self._cells = WorkerCells(bundle, self._work_store, self._device, self._shelf)
        self._statistics = BlockStatistics(plan, self._cells, self._device)
        # Tiles are for solves that are shared and buffers that grow with them; rounding on a CPU has neither.
        height = None if bundle.has_streams or self._device.type != "cpu" else _WHOLE_LINEARS
        self._outputs = [
            WorkerOutput(
                output,
                run_id,
                checkpoint=self._checkpoint,
                source_store=self._source_store,
                device=self._device,
                height=height,
                methods=methods,
                clock=self._clock,
                working=self._working,
            )
            for output in bundle.outputs
        ]
        for output in bundle.outputs:
            record_device_kind(open_store(output.work, engine), output, kind)
        self._sums.open(self._device)
        self._modules, self._heads = {}, None
        _LOG.info("takes part with %s, %d threads", kind, torch.get_num_threads())

    def abort_uploads(self) -> int:
        """See `WorkerOutput.abort_uploads`."""
        return sum(output.abort_uploads() for output in self._outputs)

    def read(self, names: Sequence[str], part: int = 0, num_parts: int = 1) -> dict[str, torch.Tensor]:
        """A part of some source tensors, in their stored dtype, on the CPU.

        Parts are runs of neighbours of about equal bytes: tensors between those asked for would be fetched
        along with them.
        """
        with self._clock.storage("read"):
            entries = sorted((self._checkpoint.tensors[n] for n in names), key=lambda e: (e.shard, e.start))
            sizes = [entry.end - entry.start for entry in entries]
            share = max(1, sum(sizes)) / num_parts
            parts = [
                min(num_parts - 1, int((end - size / 2) / share))
                for end, size in zip(accumulate(sizes), sizes, strict=True)
            ]
            mine = [entry.name for entry, found in zip(entries, parts, strict=True) if found == part]
            return read_tensors(self._source_store, self._checkpoint, mine)

    def read_packed(self, output: int, unit_name: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished unit, from the output."""
        with self._clock.storage("read"):
            return self._outputs[output].read_packed(unit_name)

    def check_finished(
        self, output: int, records: Sequence[DoneRecord]
    ) -> tuple[dict[str, DoneRecord], dict[str, str]]:
        """See `WorkerOutput.check_finished`."""
        with self._clock.storage("check"):
            return self._outputs[output].check_finished(records)

    def embed(self, parts: Sequence[Tensors], keys: Sequence[str]) -> None:
        """Have some more cells: their token ids as inputs of block 0."""
        with self._computing("embed"):
            self._cells.embed(*self._ends(_merged(parts), self._dtype), keys)

    def keep_cells(self, keys: Sequence[str]) -> None:
        """Have no other cells than these any more."""
        self._cells.keep(keys)

    def give(self, key: str) -> dict[str, tuple[torch.Tensor, int]]:
        """Part with a cell; what `take` wants."""
        return self._cells.give(key)

    def take(self, key: str, streams: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        """Have a cell that another worker gave."""
        with self._clock.computing("exchange"):
            self._cells.take(key, streams)

    def activation_bytes(self) -> int:
        """Bytes of all streams of this worker's cells."""
        return self._cells.num_bytes

    def save_activations(self, block: int) -> dict[str, tuple[str, int]]:
        """Store the streams of this worker's cells, which stand before a block; cell key -> sha256, size."""
        with self._clock.computing("checkpoint"):
            return self._cells.save(block)

    def complete_checkpoint(self, checkpoint: ActivationCheckpoint) -> None:
        """Declare a checkpoint whole, once every worker has saved its cells."""
        with self._clock.computing("checkpoint"):
            self._outputs[0].refuse_taken_over()
            activations.complete_checkpoint(self._work_store, self._plan.work, checkpoint)

    def restore_activations(self, checkpoint: ActivationCheckpoint, keys: Sequence[str]) -> None:
        """Put the streams of some cells where a checkpoint left them; `embed` has come before.

        Raises:
            ChecksumError: What is stored is not what was recorded; the streams are as they were.
        """
        with self._clock.computing("checkpoint"):
            self._cells.restore(checkpoint, keys)

    def bring_ahead(self, block: int, parts: Sequence[Tensors]) -> None:
        """Begin to bring the source tensors of a block to the device, beside what is computed there."""
        with self._clock.storage("bring"):
            self._weights.begin(block, _merged(parts))

    def load(self, block: int, parts: Sequence[Tensors], _brought: Any = None) -> None:
        """Make a block live on the device, in place of the one before; `bring_ahead` may have come before."""
        with self._computing("load"):
            self._modules.pop(_ORIGINAL, None)
            tensors = _merged(parts)
            late = self._stored_weights(block, tensors) if self._has_late_weights else {}
            tensors = self._weights.take(block, tensors, but=late)
            self._modules[_ORIGINAL] = (block, self._built(block, tensors, late, {}))

    def load_quantized(
        self, block: int, parts: Sequence[Tensors], packed: Sequence[Tensors], output: int
    ) -> None:
        """Make a block live as it was packed for an output, in place of the one before.

        Linears round their inputs where their scheme says so.
        """
        with self._computing("load"):
            self._modules.pop(_QUANTIZED, None)
            tensors, made = _merged(parts), _merged(packed)
            late: dict[str, LateWeight] = {}
            if self._has_late_weights:
                late = self._stored_weights(block, tensors)
                late |= self._outputs[output].late_levels(block, made)
            # Of late weights they stay where they are until they are made.
            made = made if late else self._weights.bring(made)
            levels = self._outputs[output].levels(block, made, late)
            others = {name: found for name, found in tensors.items() if name not in {**late, **levels}}
            tensors |= self._weights.bring(others) | levels
            inputs = input_schemes(self._outputs[output].plan.blocks[block])
            self._modules[_QUANTIZED] = (block, self._built(block, tensors, late, inputs))

    def unload(self, block: int) -> None:
        """Have a block live no longer."""
        self._modules = {kind: loaded for kind, loaded in self._modules.items() if loaded[0] != block}
        give_back_free_memory()

    def load_head(self, parts: Sequence[Tensors]) -> None:
        """Make what stands after the last block live, in place of all blocks."""
        with self._computing("load"):
            self._modules.clear()
            self._weights.forget()
            # fp32: the losses of two close models are compared, and bf16 logits carry a noise of 2^-9.
            self._heads = self._ends(_merged(parts), torch.float32)

    def observe(
        self,
        block: int,
        key: str,
        _needed: Sequence[Any],
        groups: Groups,
        excluded_rows: Sequence[int],
        exponents: Sequence[int] | None,
        moves: bool,
    ) -> dict[str, Any]:
        """Run a calibration cell through the loaded block; see `BlockStatistics.observe`."""
        with self._working("capture"):
            module = self._module(_ORIGINAL, block)
            self._cells.bring_next(key, _OBSERVED)
            return self._statistics.observe(module, block, key, groups, excluded_rows, exponents, moves=moves)

    def totals(
        self, block: int, groups: Groups, exponents: Sequence[int], bands: Sequence[Band]
    ) -> list[tuple[list[Any], list[str]]]:
        """All sums over the cells observed here, for other workers; see `BlockStatistics.totals`.

        They are kept until `forget_totals`: should another worker be lost, they are asked for again, with
        those of the cells that were then observed here.

        Args:
            bands: How the sums are cut, the same at every call for these groups.
        """
        with self._working("capture"):
            totals, keys = self._statistics.totals(block, groups, exponents)
            return self._sums.offer(block, groups, bands, totals, keys)

    def forget_totals(self, block: int, groups: Groups | None = None) -> None:
        """Nobody needs the sums of some input groups of a block, all by default, any more."""
        self._sums.forget(block, groups)

    def add_bands(self, bands: Sequence[Sequence[BandSum]]) -> list[Any]:
        """Add up bands of others, and share what each comes to; see `SumExchange.add`."""
        with self._working("exchange"):
            return self._sums.add(bands)

    def host_group(self) -> tuple[str, int] | None:
        """Let workers find each other here; see `SumExchange.host_group`."""
        return self._sums.host_group()

    def join_group(self, address: tuple[str, int] | None, rank: int, size: int) -> str | None:
        """Be in a group with workers of other nodes; see `SumExchange.join_group`."""
        with self._working("exchange"):
            return self._sums.join_group(address, rank, size)

    def reduce_bands(self, bands: Sequence[BandSum], owners: Sequence[int]) -> dict[str, Any]:
        """Add up bands with the others of the group; see `SumExchange.reduce`."""
        with self._working("exchange"):
            return self._sums.reduce(bands, owners)

    def forward(self, block: int, key: str, _needed: Sequence[Any]) -> None:
        """Move the stream of a cell that follows the original blocks through the loaded one."""
        with self._working("forward"):
            cell = self._cells[key]
            self._cells.bring_next(key, _OBSERVED)
            self._cells.move(following_stream(cell), cell, self._module(_ORIGINAL, block), block)

    def solve(
        self,
        block: int,
        output: int,
        groups: Sequence[int],
        parts: Sequence[Tensors],
        statistics: Sequence[Sequence[Any]],
        tokens: Sequence[GroupTokens],
        others: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Quantize and pack an input group, or several that are alike as one batch.

        Args:
            groups: Their numbers.
            parts: The block's source tensors.
            statistics: Of each group what `GroupSolver.solve` takes, every total as the list of its bands.
            tokens: Behind the sums of each group.
            others: Outputs that have the same codes.

        Returns:
            ``groups``: of each in order what `pack` gives.
        """
        with self._working("solve", output):
            self._forget_prepared(but=output)
            mine, totals = self._outputs[output], [_totals(sums) for sums in statistics]
            planned = mine.plan.blocks[block]
            made = mine.solver.solve_batch(planned, groups, _merged(parts), totals, tokens)
            _log_solved(block, [row for _, rows in made for row in rows])
            found = [
                self._offered(block, output, group, others, packed, rows)
                for group, (packed, rows) in zip(groups, made, strict=True)
            ]
            return {"groups": found}

    def solve_tile(
        self,
        block: int,
        output: int,
        tile: GroupTile,
        parts: Sequence[Tensors],
        statistics: Sequence[Any],
        tokens: GroupTokens,
    ) -> dict[str, Any]:
        """Quantize a row tile of an input group that has several; sums and tokens are those of the group.

        What its group shares is kept for the next tile, until `forget_prepared`.
        """
        with self._working("solve", output):
            self._forget_prepared(but=output)
            mine, totals = self._outputs[output], _totals(statistics)
            solved = mine.solver.solve_tile(mine.plan.blocks[block], tile, _merged(parts), totals, tokens)
            return {"rows": self._share(solved)}

    def forget_prepared(self) -> None:
        """No tile follows."""
        self._forget_prepared()

    def pack(
        self,
        block: int,
        output: int,
        group: int,
        tiles: Sequence[TileRows],
        tokens: GroupTokens,
        others: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Pack an input group from all its tiles, in order.

        Args:
            others: Outputs that have the same codes.

        Returns:
            ``packed`` tensors of the output and of each of the others; ``linears``, rows of the report.
        """
        with self._working("solve", output):
            mine = self._outputs[output]
            packed, rows = mine.solver.pack(mine.plan.blocks[block], group, tiles, tokens)
            _log_solved(block, rows)
            return self._offered(block, output, group, others, packed, rows)

    def write(
        self,
        output: int,
        unit_name: str,
        parts: Sequence[Tensors],
        linears: Sequence[Mapping[str, Any]] = (),
        excluded_rows: Sequence[int] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> DoneRecord:
        """See `WorkerOutput.write`."""
        with self._clock.storage("write"):
            tensors = _merged(parts)
            return self._outputs[output].write(unit_name, tensors, linears, excluded_rows, seconds or {})

    def advance(self, block: int, key: str, _needed: Sequence[Any], output: int) -> dict[str, float] | None:
        """Move the quantized stream of a cell through the block as packed for an output.

        Returns:
            Of an evaluation cell, the sums of `stream_error`.
        """
        with self._working("evaluate", output):
            cell, module = self._cells[key], self._module(_QUANTIZED, block)
            self._cells.bring_next(key, (quantized_name(output), "main"))
            stream = cell.quantized[output] if cell.quantized else cell.main
            assert stream is not None
            quantized_BTD = self._cells.move(stream, cell, module, block)
            if not cell.quantized:
                return None
            original, _ = cell.streams(output)
            return stream_error(original.hidden_BTD, quantized_BTD)

    def score(self, _block: int, key: str, _needed: Sequence[Any]) -> list[dict[str, float]]:
        """Losses of the original stream of an evaluation cell and of every output's."""
        with self._working("head"):
            assert self._heads is not None
            outer, rounded = self._heads
            cell, scores = self._cells[key], []
            for number, output in enumerate(self._outputs):
                original_BTD, quantized_BTD = (stream.hidden_BTD for stream in cell.streams(number))
                head = rounded if output.plan.rounded else None
                scores.append(score_streams(outer, cell.ids_BT, original_BTD, quantized_BTD, head))
            return scores

    def convert_unit(self, unit_name: str) -> None:
        """See `WorkerOutput.convert_unit`; where several are made, blocks are read once for all."""
        (output,) = self._outputs
        output.convert_unit(unit_name)

    def finish_unit(self, unit_name: str) -> DoneRecord:
        """See `WorkerOutput.finish_unit`."""
        (output,) = self._outputs
        return output.finish_unit(unit_name)

    def stage(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Make what is published with the shards; then no checkpoint is needed any more."""
        with self._clock.computing("stage"):
            for output, report in zip(self._outputs, reports, strict=True):
                output.stage(report)
            activations.remove_checkpoints(self._work_store, self._plan.work)

    def stop(self) -> None:
        """Leave off at the next cell or row tile; what was begun raises WorkerError."""
        self._stopped.set()

    def telemetry(self) -> dict[str, Any]:
        """What this worker spent so far."""
        every = (
            self._source_store,
            self._work_store,
            *(s for output in self._outputs for s in output.stores),
        )
        stores = {id(store): store for store in every}.values()
        return {
            "stages": self._clock.stages,
            "own_stages": self._clock.own_stages,
            "timeline": self._clock.timeline(),
            "bytes_read": sum(store.traffic.bytes_read for store in stores),
            "bytes_written": sum(store.traffic.bytes_written for store in stores),
            "cpu_seconds": time.process_time(),
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_reserved() if self._device.type == "cuda" else None,
            "waiting_on_disk_bytes": self._shelf.file_bytes,
            "device_kinds": device_kinds(self._work_store, self._plan),
            "cholesky_check": None if self._cholesky_check is None else self._cholesky_check.to_dict(),
        }

    def _offered(
        self,
        block: int,
        output: int,
        group: int,
        others: Sequence[int],
        packed: Tensors,
        rows: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        mine = self._outputs[output]
        repacked = [self._outputs[other].repacked(mine, block, group, packed) for other in others]
        return {"packed": [self._share(made) for made in (packed, *repacked)], "linears": rows}

    def _forget_prepared(self, but: int | None = None) -> None:
        for number, output in enumerate(self._outputs):
            if number != but:
                output.solver.forget()

    def _refuse_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise WorkerError("the job was stopped; the same command continues it")

    def _checked_choleskys(self, bundle: Bundle) -> CholeskyCheck | None:
        """Of the largest factor that a GPU will be asked for; LAPACK has given no reason to doubt it."""
        linears = [linear for plan in bundle.outputs for block in plan.blocks for linear in block.linears]
        columns = max((linear.columns for linear in linears if linear.method == "gptq"), default=0)
        if self._device.type == "cpu" or not columns:
            return None
        found = self._check_choleskys(columns, self._device)
        for way, problem in found.problems.items():
            words = "factors of %d columns are made in the way %s, as %s failed: %s"
            _LOG.warning(words, columns, found.way, way, problem)
        return found

    @contextmanager
    def _working(self, stage: str, output: int | None = None) -> Iterator[None]:
        self._refuse_if_stopped()
        with self._computing(stage, output):
            yield

    @contextmanager
    def _computing(self, stage: str, output: int | None = None) -> Iterator[None]:
        with self._clock.computing(stage, output), torch.inference_mode():
            try:
                yield
            finally:
                give_back_free_memory()

    def _stored_weights(self, block: int, tensors: Tensors) -> dict[str, LateWeight]:
        parts = [linear.weight for linear in self._plan.blocks[block].linears]
        names = [part.tensor for part in parts if part.view is None and part.tensor in tensors]
        return {name: stored_weight(tensors[name]) for name in names}

    def _ends(self, tensors: Tensors, dtype: torch.dtype) -> Ends:
        # Outputs that round an end have the same levels of it.
        rounded = next((output.plan.rounded for output in self._outputs if output.plan.rounded), ())
        return live_ends(self._skeleton, rounded, tensors, dtype=dtype, device=self._device)

    def _built(
        self,
        block: int,
        tensors: Tensors,
        late: Mapping[str, LateWeight],
        inputs: Mapping[str, ActivationScheme],
    ) -> nn.Module:
        kind = {"dtype": self._dtype, "device": self._device}
        return self._skeleton.build_block(block, tensors, late=late, inputs=inputs, **kind)

    def _module(self, kind: str, block: int) -> nn.Module:
        loaded, module = self._modules[kind]
        assert loaded == block, f"block {loaded} is loaded, not {block}"
        return module


def _log_solved(block: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line of a kind a call, however many linears were solved in it."""
    fallen = [row for row in rows if row["fallback"]]
    if fallen:
        first, more = fallen[0], f", and {len(fallen) - 1} linears more" if len(fallen) > 1 else ""
        words = "block %d, %s: fallback %s with %s tokens%s"
        _LOG.info(words, block + 1, first["name"], first["fallback"], first["tokens"], more)
    if short := [row for row in rows if row["memory_step"]]:
        words = "block %d: memory of the device did not suffice for %d linears, as %s: %s"
        _LOG.warning(words, block + 1, len(short), short[0]["name"], short[0]["memory_step"])


def _merged(parts: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for part in parts:
        merged |= part
    return merged


def _totals(statistics: Sequence[Any]) -> list[list[Total]]:
    return [[Total.of(bands) for bands in kind] for kind in statistics]
