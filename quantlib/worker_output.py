"""What one worker does for one output: solve its linears, make its blocks live, write its units."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from quantlib.checkpoint.dtypes import torch_dtype
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.shard_forms import ShardForms
from quantlib.checkpoint.writer import ShardReceipt, write_shard
from quantlib.job.finished import check_unit, read_unit
from quantlib.job.lease import refuse_taken_over
from quantlib.job.manifest import DoneRecord, remove_record, store_record
from quantlib.job.plan import Plan, UnitPlan
from quantlib.job.report_figures import size
from quantlib.job.staging import stage
from quantlib.memory_ladder import MemoryLadder
from quantlib.methods.whole_solve import Method
from quantlib.model.late_weights import LateWeight
from quantlib.packing import FORMATS
from quantlib.packing.outliers import all_packed_names
from quantlib.packing.repacking import repacked
from quantlib.rounded_ends import rounded_blocks
from quantlib.solver_settings import SolverSettings
from quantlib.stage_clock import StageClock
from quantlib.steps import corrected_biases, dequantized_weights, late_levels, split_biases
from quantlib.storage import Store, join_uri, open_store
from quantlib.unit_converter import BegunShard, UnitConverter

_LOG = logging.getLogger(__name__)
Tensors = Mapping[str, torch.Tensor]


class WorkerOutput:
    """An output, as a worker sees it.

    Args:
        plan: Of the output.
        run_id: The run that holds the lease of the work prefix; it is checked before a unit is recorded.
        checkpoint: The source.
        source_store: Where it lies.
        device: Of the worker.
        height: Most rows of a tile; by default from columns and device.
        methods: Name -> method, on the device.
        clock: Is told what reading and writing take.
        working: A context for what a stage computes; it raises when the job was stopped.

    Attributes:
        stores: Those of the output and of its work prefix.
        packer: Its layout.
        solver: Of its linears.
    """

    def __init__(
        self,
        plan: Plan,
        run_id: str | None,
        *,
        checkpoint: Checkpoint,
        source_store: Store,
        device: torch.device,
        height: int | None,
        methods: Mapping[str, Method],
        clock: StageClock,
        working: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.plan, self._run_id, self._device = plan, run_id, device
        self._checkpoint, self._source_store, self._clock = checkpoint, source_store, clock
        self._units = {unit.name: unit for unit in plan.units}
        self.packer = FORMATS[plan.options["format"]]
        engine = plan.options["storage_engine"]
        self._output_store, self._work_store = open_store(plan.output, engine), open_store(plan.work, engine)
        self.stores = (self._output_store, self._work_store)
        settings = SolverSettings.from_options(plan.options)
        self.solver = MemoryLadder(self.packer, settings, device, height, methods)
        self._forms = ShardForms(plan, checkpoint, source_store)
        self._converter = UnitConverter(
            checkpoint, source_store, self._output_store, self._forms, self.solver, clock, working
        )
        self._begun: dict[str, BegunShard] = {}

    def abort_uploads(self) -> int:
        """Give up what lost workers were writing, and tell how many uploads; no living one may be writing."""
        places = ((self._output_store, self.plan.output), (self._work_store, self.plan.work))
        return sum(store.abort_uploads(uri) for store, uri in places)

    def read_packed(self, unit_name: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished unit, from the output."""
        unit = self._units[unit_name]
        return read_unit(self._output_store, self.plan, unit, self._forms.of(unit))

    def check_finished(self, records: Sequence[DoneRecord]) -> tuple[dict[str, DoneRecord], dict[str, str]]:
        """Of units an earlier start finished: the records that stand, and what is wrong with the others.

        A record that does not stand is removed, so that its unit is done again.
        """
        intact, damaged = {}, {}
        for record in records:
            unit = self._units[record.unit]
            standing, problem = check_unit(self._output_store, self.plan, unit, record)
            if standing is None:
                remove_record(self._work_store, self.plan.work, record.unit)
                damaged[record.unit] = problem
            else:
                intact[record.unit] = standing
        return intact, damaged

    def repacked(
        self, other: "WorkerOutput", block: int, group: int, packed: Tensors
    ) -> dict[str, torch.Tensor]:
        """An input group as this output holds it.

        Args:
            other: An output of the same codes.
            packed: What it holds.
        """
        planned = self.plan.blocks[block]
        linears = [linear for linear in planned.linears if linear.name in planned.input_groups[group]]
        made: dict[str, torch.Tensor] = {}
        for linear in linears:
            assert linear.scheme is not None, "only such linears are in a group"
            model_dtype = torch_dtype(linear.weight_dtype)
            names = [*all_packed_names(other.packer, linear.name), f"{linear.name}.bias"]
            there = {name: packed[name].to(self._device) for name in names if name in packed}
            layouts = (other.packer, self.packer)
            made |= repacked(linear.name, linear.scheme, there, *layouts, model_dtype)
        return {name: tensor.cpu() for name, tensor in made.items()}

    def late_levels(self, block: int, packed: Tensors) -> dict[str, LateWeight]:
        """Weights of a block as they were packed, made while a linear runs; by stored tensor."""
        return late_levels(self.plan.blocks[block], packed, self.packer, self._device)

    def levels(self, block: int, packed: Tensors, late: Mapping[str, LateWeight]) -> dict[str, torch.Tensor]:
        """What stands in place of a block's source tensors, on the device, but for what is made late."""
        plan = self.plan.blocks[block]
        found = dequantized_weights(plan, packed, self.packer, self._device, is_late=late)
        return found | corrected_biases(plan, packed)

    def write(
        self,
        unit_name: str,
        tensors: Tensors,
        linears: Sequence[Mapping[str, Any]],
        excluded_rows: Sequence[int],
        seconds: Mapping[str, float],
    ) -> DoneRecord:
        """Stream a unit's shard to its final place and record it.

        Raises:
            LeaseError: Another run has taken over; the shard is written, with the bytes that run would write.
        """
        unit = self._units[unit_name]
        block = None if unit.block is None else self.plan.blocks[unit.block]
        given = {**tensors, **split_biases(block, tensors), **rounded_blocks(unit.rounded, tensors)}
        promised = {spec.name for spec in unit.tensors}
        made = {name: tensor for name, tensor in given.items() if name in promised}
        receipt = write_shard(self._output_store, self._uri(unit), unit.tensors, made, self._forms.of(unit))
        return self._record(unit, receipt, linears, excluded_rows, seconds)

    def convert_unit(self, unit_name: str) -> None:
        """Read and quantize one unit without data; what is left to write of it is for `finish_unit`."""
        unit = self._units[unit_name]
        block = None if unit.block is None else self.plan.blocks[unit.block]
        self._begun[unit_name] = self._converter.convert(unit, block, self._uri(unit))

    def finish_unit(self, unit_name: str) -> DoneRecord:
        """Wait until a converted unit is written, and record it."""
        begun = self._begun.pop(unit_name)
        receipt = begun.receipt.result()
        with self._clock.storage("write"):
            return self._record(self._units[unit_name], receipt, begun.rows)

    def stage(self, report: Mapping[str, Any]) -> None:
        """Make all that is published with the shards; see `quantlib.job.staging.stage`."""
        self.refuse_taken_over()
        stage(self._source_store, *self.stores, self.plan, self._checkpoint, report)

    def refuse_taken_over(self) -> None:
        """Make sure that the run still holds the lease.

        Raises:
            LeaseError: Another run has taken over.
        """
        if self._run_id is not None:
            refuse_taken_over(self._work_store, self.plan.work, self._run_id)

    def _uri(self, unit: UnitPlan) -> str:
        return join_uri(self.plan.output, unit.shard)

    def _record(
        self,
        unit: UnitPlan,
        receipt: ShardReceipt,
        linears: Sequence[Mapping[str, Any]],
        excluded_rows: Sequence[int] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> DoneRecord:
        record = DoneRecord(
            unit=unit.name,
            identity=self.plan.identity(),
            sha256=receipt.sha256,
            size_bytes=receipt.size_bytes,
            etag=receipt.etag,
            linears=tuple(linears),
            excluded_rows=tuple(excluded_rows),
            seconds=dict(seconds or {}),
        )
        self.refuse_taken_over()
        stored = store_record(self._work_store, self.plan.work, record)
        place = unit.name if unit.block is None else f"block {unit.block + 1}"
        _LOG.info("%s: written, %s of %s", place, size(receipt.size_bytes), self._uri(unit))
        return stored
