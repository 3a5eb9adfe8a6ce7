"""Units without data: what is read when, and that an error on any side leaves no shard."""

from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch

from quantlib import unit_converter
from quantlib.checkpoint.index import Checkpoint, open_checkpoint
from quantlib.checkpoint.shard_forms import ShardForms
from quantlib.errors import NumericsError, TransientStorageError
from quantlib.job.plan import Plan
from quantlib.job.planner import build_plan, open_planned_source
from quantlib.memory_ladder import MemoryLadder
from quantlib.packing import FORMATS
from quantlib.solver_settings import SolverSettings
from quantlib.stage_clock import StageClock
from quantlib.storage.local_engine import LocalStore
from quantlib.unit_converter import UnitConverter, UnitPart, parts_of
from tests.support.tiny_jobs import tiny_options, tiny_source

RULES = ({"match": "*.o_proj", "keep": True},)


class CountedStore(LocalStore):
    """Local files; counts reads, and fails at the n-th read or the n-th piece of a shard."""

    def __init__(self, *, failing_read: int | None = None, failing_write: int | None = None) -> None:
        super().__init__()
        self.failing_read, self.failing_write = failing_read, failing_write
        self.calls = count(1)
        self.reads: list[int] = []

    def read_ranges(self, info, ranges):
        number = next(self.calls)
        self.reads.append(number)
        if number == self.failing_read:
            raise TransientStorageError("this read fails")
        return super().read_ranges(info, ranges)

    def open_writer(self, uri):
        writer = super().open_writer(uri)
        write, calls = writer.write, count(1)

        def failing(data) -> None:
            if next(calls) == self.failing_write:
                raise TransientStorageError("this write fails")
            write(data)

        writer.write = failing  # pyright: ignore[reportAttributeAccessIssue]
        return writer


@pytest.fixture
def job(tmp_path) -> tuple[Plan, Checkpoint]:
    tiny_source(tmp_path / "source", max_shard_size="1GB")
    options = tiny_options(tmp_path, method="rtn", calibration=None, evaluation=None, rules=RULES)
    plan, _ = build_plan(options, threads=1)
    return plan, open_planned_source(LocalStore(), plan)


def _convert(job, store, folder: Path):
    plan, checkpoint = job
    solver = MemoryLadder(
        FORMATS["compressed-tensors"], SolverSettings.from_options(plan.options), torch.device("cpu")
    )
    forms = ShardForms(plan, checkpoint, store)
    converter = UnitConverter(checkpoint, store, store, forms, solver, StageClock(), lambda _: nullcontext())
    begun = converter.convert(plan.block_units[1], plan.blocks[1], f"file://{folder}/shard.safetensors")
    return begun.receipt.result(), begun.rows


def test_parts_cover_every_source_tensor_once(job):
    plan, _ = job
    for unit in plan.units:
        block = None if unit.block is None else plan.blocks[unit.block]
        parts = parts_of(unit, block, lambda name: 8 << 20)
        names = [name for part in parts for name in part.sources]
        assert len(names) == len(set(names))
        assert set(names) == (set(unit.copied) if block is None else set(block.tensors))


def test_parts_of_copied_tensors_are_as_large_as_a_request(job):
    plan, _ = job
    unit = plan.block_units[0]
    assert [part.groups for part in parts_of(unit, None, lambda name: 20 << 20)] == [(), ()]
    assert parts_of(unit, None, lambda name: 1) == [UnitPart(sources=tuple(sorted(unit.copied)))]


def test_unit_report_rows_are_in_the_order_of_the_input_groups(job, tmp_path):
    plan, _ = job
    _, rows = _convert(job, CountedStore(), tmp_path)
    assert [row["name"] for row in rows] == [n for group in plan.blocks[1].input_groups for n in group]


@pytest.mark.parametrize("failing", [{"failing_read": n} for n in (1, 2, 4)])
def test_unit_whose_source_cannot_be_read_leaves_no_shard(job, tmp_path, failing):
    with pytest.raises(TransientStorageError, match="this read fails"):
        _convert(job, CountedStore(**failing), tmp_path / "output")
    assert not list((tmp_path / "output").rglob("*"))


@pytest.mark.parametrize("failing", [{"failing_write": n} for n in (1, 2, 6)])
def test_unit_that_cannot_be_written_leaves_no_shard(job, tmp_path, failing):
    with pytest.raises(TransientStorageError, match="this write fails"):
        _convert(job, CountedStore(**failing), tmp_path / "output")
    assert not list((tmp_path / "output").rglob("*"))


def test_unit_with_a_weight_that_is_not_finite_leaves_no_shard_and_reads_little_more(
    job, tmp_path, monkeypatch
):
    plan, checkpoint = job
    entry = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    shard = Path(checkpoint.shards[entry.shard].uri.removeprefix("file://"))
    content = bytearray(shard.read_bytes())
    content[entry.start : entry.start + 2] = b"\xc0\x7f"  # NaN in bf16
    shard.write_bytes(content)
    # Every tensor that is copied becomes a part of its own.
    monkeypatch.setattr(unit_converter, "_COPIED_BYTES", 1)
    store = CountedStore()
    with pytest.raises(NumericsError, match="down_proj"):
        _convert((plan, open_checkpoint(LocalStore(), plan.source)), store, tmp_path / "output")
    assert not list((tmp_path / "output").rglob("*"))
    num_parts = len(parts_of(plan.block_units[1], plan.blocks[1], lambda _: 1))
    # A norm comes before it in the file, and two parts are read ahead.
    assert (num_parts, len(store.reads)) == (6, 4)
