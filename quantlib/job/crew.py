"""The workers of one job: who does which part of a stage, and what travels between them.

A worker is a `quantlib.block_runner.BlockRunner` somewhere: in this process, or inside a Ray actor. A
`Transport` starts its methods and hands back handles; a handle given as an argument reaches the other worker
as the value it stands for. Tensors travel only so, never through this object. Each public method is one
stage of the conversion.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from quantlib.errors import NumericsError, QuantError
from quantlib.job.activations import ActivationCheckpoint
from quantlib.job.manifest import DoneRecord
from quantlib.job.options import JobOptions
from quantlib.job.plan import BlockPlan, Plan, UnitPlan
from quantlib.storage import normalize_uri

Handle = Any

_ADDRESSES = ("source", "output", "work", "calibration", "evaluation")

# Calibration rows whose activations overflow are left out; with more of them than this the model or the
# text is at fault and codes fitted to the rest would be worth little.
MAX_EXCLUDED_SHARE = 0.1


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
    """

    def __init__(self, transport: Transport, threads: int) -> None:
        self._transport = transport
        self._threads = threads
        self._sources: dict[int, list[Handle]] = {}
        self._packed: dict[int, list[Handle]] = {}
        self._totals: dict[int, dict[int, list[Handle]]] = {}
        self._exponents: dict[int, list[int]] = {}
        self._num_rows = 0
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
        """Give every worker the plan and its share of the cells.

        Args:
            run_id: The run that holds the lease; units are recorded only while it does.
        """
        self._plan, self._run_id = plan, run_id
        workers = range(self.num_workers)
        handles = [self._transport.submit(w, "open", plan, w, self.num_workers, run_id) for w in workers]
        self._num_rows = sum(self._transport.result(handle)["rows"] for handle in handles)

    def renew(self) -> int:
        """Start the workers anew after one was lost; what they held is gone, the plan is given again.

        Returns:
            How many unfinished uploads of the old ones were given up.
        """
        for kept in (self._sources, self._packed, self._totals, self._exponents):
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
            self._all("embed", parts)
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

    def capture(self, block: int, excluded_rows: Sequence[int]) -> dict[str, Any]:
        """One forward of every calibration cell through a block: statistics and the next inputs.

        Args:
            excluded_rows: Calibration rows left out in blocks before.
        """
        self._load(block)
        begun = self._all("begin_capture", block, list(excluded_rows))
        exponents = next(b["exponents"] for b in begun if b["exponents"] is not None)
        captured = self._all("capture", block, exponents)
        self._exponents[block] = exponents
        self._totals[block] = {
            group: [summary["totals"][group] for summary in captured] for group in range(len(exponents))
        }
        excluded = sorted({row for summary in captured for row in summary["excluded"]}.union(excluded_rows))
        self._refuse_many(excluded)
        return {"excluded_rows": excluded, "tokens": sum(s["tokens"] for s in captured)}

    def forward(self, block: int) -> None:
        """Run the original streams through a block without statistics."""
        self._load(block)
        self._all("forward", block)

    def solve(self, block: int, tokens: int) -> list[dict[str, Any]]:
        """Quantize a block's linears, input groups shared out by cost; report rows in the plan's order."""
        plan = self._opened().blocks[block]
        shares = share_by_cost([_solve_cost(plan, group) for group in plan.input_groups], self.num_workers)
        totals = self._totals.get(block, {})
        exponents = self._exponents.get(block, [])
        handles = []
        for worker, groups in enumerate(shares):
            if groups:
                chosen = [_statistics(g, len(plan.input_groups), totals, exponents) for g in groups]
                handles.append(self._transport.submit(worker, "solve", block, groups, chosen, tokens))
        solved = [self._transport.result(handle) for handle in handles]
        self._packed[block] = [s["packed"] for s in solved]
        self._totals.pop(block, None)
        self._exponents.pop(block, None)
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
        sums = self._all("advance", block, self._packed[block])
        cells = {cell: values for summary in sums for cell, values in summary.items()}
        return _stream_errors([cells[cell] for cell in sorted(cells)])

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
            sums = self._all("head", parts)
            cells = {cell: values for summary in sums for cell, values in summary.items()}
            figures = [cells[cell] for cell in sorted(cells)]
        records = [self._one("write", unit.name, parts) for unit in units]
        return {"figures": figures, "records": records}

    def convert_unit(self, unit: UnitPlan, worker: int) -> DoneRecord:
        """Read, quantize and write one unit in one go, for methods that need no activations."""
        return self._transport.result(self._transport.submit(worker, "convert_unit", unit.name))

    def publish(self, report: dict[str, Any]) -> None:
        """Side files and report, then the index, then config.json."""
        self._one("publish", report)

    def telemetry(self) -> list[dict[str, Any]]:
        """Seconds, traffic and peak memory of every worker."""
        return self._all("telemetry")

    def _opened(self) -> Plan:
        assert self._plan is not None, "open(plan) comes first"
        return self._plan

    def _load(self, block: int) -> None:
        self.prefetch(block)
        try:
            self._all("load", block, self._sources[block])
        except QuantError:
            # What could not be read is read anew when the stage is tried again.
            self._sources.pop(block)
            raise

    def _read(self, names: Sequence[str]) -> list[Handle]:
        workers = range(self.num_workers)
        return [self._transport.submit(w, "read", list(names), self.num_workers) for w in workers]

    def _one(self, method: str, *arguments: Any) -> Any:
        return self._transport.result(self._transport.submit(0, method, *arguments))

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        handles = [self._transport.submit(w, method, *arguments) for w in range(self.num_workers)]
        return [self._transport.result(handle) for handle in handles]

    def _refuse_many(self, excluded_rows: Sequence[int]) -> None:
        if len(excluded_rows) > MAX_EXCLUDED_SHARE * self._num_rows:
            raise NumericsError(
                f"{len(excluded_rows)} of {self._num_rows} calibration rows give non-finite activations,"
                f" more than {MAX_EXCLUDED_SHARE:.0%}; check the checkpoint, or calibrate on other text",
                rows=list(excluded_rows),
            )


def _statistics(
    group: int, num_groups: int, totals: Mapping[int, list[Handle]], exponents: Sequence[int]
) -> list[Any]:
    """Partial sums and exponent of a group; then, if there are any, of its products with the reference."""
    found = [totals.get(group, []), exponents[group] if exponents else 0]
    cross = group + num_groups
    return [*found, totals[cross], exponents[cross]] if cross in totals else found


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
