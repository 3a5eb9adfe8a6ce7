"""How a job is cut to fit: no budget exceeded, nothing left out, and not more than it takes."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.checkpoint.layout import spec_bytes
from quantlib.errors import RecipeError
from quantlib.job.bundle import bundle_of
from quantlib.job.memory import Budgets, MemoryPlan, Room, Surroundings, budgets_from, plan_memory
from quantlib.job.memory_needs import (
    block_needs,
    cell_needs,
    head_needs,
    prelude_needs,
    records_needs,
    unit_needs,
    writing_needs,
)
from quantlib.job.plan import BlockPlan, Plan
from quantlib.job.planner import build_plan
from quantlib.schemes import scheme_from_name
from tests.support.linear_plans import linear_plan
from tests.support.tiny_jobs import tiny_options

_SCHEME = scheme_from_name("W4A16", 32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Plan:
    root: Path = tmp_path_factory.mktemp("memory")
    return build_plan(tiny_options(root), 1)[0]


def _with_blocks(plan: Plan, shapes: list[list[tuple[int, int]]], propagation: str) -> Plan:
    """The same job over blocks of one linear a group, of these rows and columns."""
    blocks, units = [], [unit for unit in plan.units if unit.stage != "block"]
    for index, linears in enumerate(shapes):
        names = [f"model.layers.{index}.l{number}" for number in range(len(linears))]
        block = BlockPlan(
            index=index,
            prefix=f"model.layers.{index}",
            tensors=tuple(f"{name}.weight" for name in names),
            linears=tuple(linear_plan(n, r, c, _SCHEME) for n, (r, c) in zip(names, linears, strict=True)),
            input_groups=tuple((name,) for name in names),
        )
        blocks.append(block)
        first = next(unit for unit in plan.units if unit.stage == "block")
        units.append(
            dataclasses.replace(first, name=f"block-{index:05d}", block=index, tensors=(), copied=())
        )
    options = {**plan.options, "propagation": propagation}
    return dataclasses.replace(plan, blocks=tuple(blocks), units=tuple(units), options=options)


@st.composite
def _jobs(draw):
    width = st.integers(1, 40).map(lambda n: 32 * n)
    linears = st.lists(st.tuples(width, width), min_size=1, max_size=6)
    shapes = draw(st.lists(linears, min_size=1, max_size=3))
    return shapes, draw(st.sampled_from(["original", "quantized"]))


_AROUND = [
    Surroundings(workers=1, idle_bytes=10**6),
    Surroundings(workers=4, idle_bytes=10**6, store_workers=2),
    Surroundings(workers=4, idle_bytes=10**6, store_workers=4, has_device=True),
]


def _sizes(found: MemoryPlan) -> tuple[int, ...]:
    return tuple(sum(place.values()) for place in (found.worker, found.device, found.store))


@settings(max_examples=80, deadline=None)
@given(job=_jobs(), around=st.sampled_from(_AROUND), share=st.floats(0.0, 1.2))
def test_every_group_is_in_one_slice_and_no_budget_exceeded(tiny, job, around, share):
    plan = _with_blocks(tiny, *job)
    roomy = plan_memory(bundle_of([plan]), around, Budgets())
    assert roomy.pipelines
    assert max(len(passes) for passes in roomy.slices) == 1
    worker, device, store = (max(1, int(share * size)) for size in _sizes(roomy))
    budgets = Budgets(worker=worker, device=device, store=store)
    try:
        found = plan_memory(bundle_of([plan]), around, budgets)
    except RecipeError as refused:
        needed, option = refused.facts["needed_bytes"], refused.facts["option"]
        assert isinstance(needed, int)
        place = {"worker_memory": "worker", "device_memory": "device", "object_store_memory": "store"}[
            str(option)
        ]
        assert needed > getattr(budgets, place)
        # That much will do, as far as this budget goes.
        try:
            plan_memory(bundle_of([plan]), around, dataclasses.replace(budgets, **{place: needed}))
        except RecipeError as other:
            assert other.facts["option"] != option
        with pytest.raises(RecipeError) as still:
            plan_memory(bundle_of([plan]), around, dataclasses.replace(budgets, **{place: needed - 1}))
        assert still.value.facts["option"] == option
        return
    for block, passes in zip(plan.blocks, found.slices, strict=True):
        assert [group for groups in passes for group in groups] == list(range(len(block.input_groups)))
    for used, limit in zip(_sizes(found), (worker, device, store), strict=True):
        assert not used or used <= limit
    if share >= 1.0:
        assert (found.pipelines, found.waiting_bytes, found.slices) == (True, 0, roomy.slices)
        assert not found.has_late_weights
    assert not (found.pipelines and found.has_late_weights)


@settings(max_examples=40, deadline=None)
@given(job=_jobs(), shares=st.tuples(st.floats(0.2, 1.0), st.floats(0.2, 1.0)))
def test_more_memory_never_means_more_passes(tiny, job, shares):
    plan, around = _with_blocks(tiny, *job), _AROUND[0]
    size = _sizes(plan_memory(bundle_of([plan]), around, Budgets()))[0]
    passes = []
    for share in sorted(shares):
        try:
            found = plan_memory(bundle_of([plan]), around, Budgets(worker=int(share * size)))
        except RecipeError:
            continue
        passes.append(sum(len(block) for block in found.slices))
    assert passes == sorted(passes, reverse=True)


@pytest.mark.parametrize(
    ("workers", "store_workers", "sums"), [(2, 2, 2), (4, 4, 4 + 1), (2, 1, 1), (4, 2, 2 + 2)]
)
def test_object_store_holds_what_was_observed_and_what_it_comes_to(tiny, workers, store_workers, sums):
    """Of more than two workers: on a node its sum, and with other nodes what the sums of all come to."""
    plan = _with_blocks(tiny, [[(96, 64)]], "original")
    around = Surroundings(workers=workers, idle_bytes=0, store_workers=store_workers)
    store = plan_memory(bundle_of([plan]), around, Budgets()).store
    total = block_needs(plan, plan.blocks[0]).groups[0].total
    assert store["sums"] + store["merged sums"] == sums * total


def test_needs_of_a_block_from_its_shapes(tiny):
    """R = 96, C = 64: float32 streams, int64 sums of the lower triangle, an fp32 Hessian and its factor."""
    plan = _with_blocks(tiny, [[(96, 64)]], "original")
    needs = block_needs(plan, plan.blocks[0])
    assert (needs.live, needs.late, needs.levels) == (4 * 96 * 64, 4 * 96 * 64, 0)
    assert needs.unpacked == 2.5 * 96 * 64
    group = needs.groups[0]
    assert group.partial == 4 * 64 * 64
    assert group.total == 2 * group.partial
    assert group.source == 2 * 96 * 64
    assert group.solve >= 8 * 64 * 64 + 4 * 96 * 64
    rows, length, cells = plan.options["sequences"], plan.options["sequence_length"], plan.sequences_per_cell
    held_out = plan.options["evaluation_sequences"]
    assert rows <= cells
    assert held_out <= cells
    assert cell_needs(plan, 1).streams == 4 * 64 * length * (rows + 2 * held_out)
    many = dataclasses.replace(plan, sequences_per_cell=2)
    assert cell_needs(many, 1).streams == 4 * 64 * length * 2 * (
        math.ceil(rows / 2) + 2 * math.ceil(held_out / 2)
    )
    assert cell_needs(many, 1000).streams == 4 * 64 * length * 2 * 3


def test_late_weights_are_those_of_kept_linears_too(tmp_path):
    given = {"rules": [{"match": "*.o_proj", "keep": True}]}
    some, all_ = (build_plan(tiny_options(tmp_path, **values), 1)[0] for values in (given, {}))
    lates = [block_needs(plan, plan.blocks[0]).late for plan in (some, all_)]
    assert lates[0] == lates[1]


def test_working_of_a_batch_beside_the_cell_it_is_of(tiny):
    plan = dataclasses.replace(_with_blocks(tiny, [[(96, 64)]], "original"), sequences_per_cell=8)
    length = plan.options["sequence_length"]
    needs = [
        cell_needs(dataclasses.replace(plan, sequences_per_batch=rows), 1).working for rows in (1, 3, 99)
    ]
    assert needs[1] - needs[0] == 2 * length * 4 * (4 * 64 + 4 * 96)
    # No batch is larger than its cell.
    assert needs[2] - needs[0] == 7 * length * 4 * (4 * 64 + 4 * 96)
    assert needs[0] == length * 4 * (4 * 64 + 4 * 96) + 2 * 8 * length * 64 * 4


def test_ends_take_their_tensors_as_stored_and_as_run(tiny):
    """Vocabulary 96, hidden 64, bf16 source, fp32 streams; the model has a head of its own."""
    cell = 4 * tiny.sequences_per_cell * 32 * 64
    prelude, head = prelude_needs(tiny), head_needs(tiny)
    assert (prelude.source, prelude.live, prelude.working) == (2 * 96 * 64, 4 * 96 * 64, 2 * cell)
    norm = 64
    assert (head.source, head.live) == (2 * (96 * 64 + norm), 4 * (96 * 64 + norm))
    assert head.working == 2 * cell + 2 * 4 * 96 * 32
    unscored = head_needs(dataclasses.replace(tiny, evaluation_digest=None))
    assert (unscored.source, unscored.live, unscored.working) == (head.source, 0, 0)


def test_decoding_is_planned_where_it_reads(tiny):
    """Each worker reads one thing at a time: what it takes for that comes on top of what is there then."""
    units = {unit.stage: unit.name for unit in tiny.units}
    for stage in ("prelude", "block", "tail"):
        plan = dataclasses.replace(tiny, decoding_bytes={units[stage]: 10**9})
        for around in _AROUND:
            plain, found = (plan_memory(bundle_of([p]), around, Budgets()).worker for p in (tiny, plan))
            assert found["reading"] >= 10**9
            assert sum(found.values()) < sum(plain.values()) + found["reading"]


def test_block_is_decoded_before_it_is_live(tiny):
    """In the least memory nothing is there beside a later block while it is read."""
    shapes = [[(96, 64)], [(96, 64)]]
    plan = dataclasses.replace(_with_blocks(tiny, shapes, "original"), decoding_bytes={"block-00001": 10**9})
    with pytest.raises(RecipeError) as refused:
        plan_memory(bundle_of([plan]), Surroundings(workers=1, idle_bytes=0), Budgets(worker=1))
    source = block_needs(plan, plan.blocks[1]).source
    assert refused.value.facts["needed_bytes"] == 10**9 + source + records_needs(plan)


def test_units_without_data_are_decoded_two_parts_at_a_time(tiny):
    plan = dataclasses.replace(tiny, calibration_digest=None, evaluation_digest=None)
    plain = plan_memory(bundle_of([plan]), _AROUND[0], Budgets()).worker
    decoded = dataclasses.replace(
        plan, decoding_bytes=dict.fromkeys((unit.name for unit in plan.units), 10**9)
    )
    found = plan_memory(bundle_of([decoded]), _AROUND[0], Budgets()).worker
    assert sum(found.values()) == sum(plain.values()) + 2 * 10**9


def test_embedding_that_outgrows_all_blocks_is_planned_for(tiny):
    def grown(unit):
        specs = tuple(dataclasses.replace(spec, shape=(10**6, 64)) for spec in unit.tensors)
        return dataclasses.replace(unit, tensors=specs) if unit.stage == "prelude" else unit

    plan = dataclasses.replace(tiny, units=tuple(map(grown, tiny.units)))
    found = plan_memory(bundle_of([plan]), Surroundings(workers=1, idle_bytes=0), Budgets())
    assert found.worker["ends"] == 4 * 10**6 * 64


def test_streams_beside_a_gpu_are_pinned_and_pass_by_it(tiny):
    """Room is kept on the device for those that come and go; what is pinned is a power of two a stream."""
    plan = _with_blocks(tiny, [[(96, 96)]], "original")
    options = {**plan.options, "sequence_length": 100, "sequences": 1000}
    plan = dataclasses.replace(plan, options=options, sequences_per_cell=10)
    around = Surroundings(workers=1, idle_bytes=0, has_device=True)
    needs = cell_needs(plan, 1)
    all_there = plan_memory(bundle_of([plan]), around, Budgets())
    size = sum(all_there.device.values())
    assert (all_there.waiting_bytes, all_there.device["passing activations"]) == (0, 0)
    at_limit = plan_memory(bundle_of([plan]), around, Budgets(device=size))
    assert (at_limit.waiting_bytes, at_limit.activation_bytes) == (0, needs.streams)
    found = plan_memory(bundle_of([plan]), around, Budgets(device=size - 1))
    assert found.waiting_bytes == needs.passing + 1
    assert found.activation_bytes == needs.streams - found.waiting_bytes
    assert sum(found.device.values()) == size - 1
    stream = 10 * 100 * 96 * 4
    assert needs.passing == 3 * stream < needs.streams
    assert stream < needs.pinned * stream == 2 ** math.ceil(math.log2(stream))
    waiting = found.worker["waiting activations"]
    assert waiting == math.ceil(needs.pinned * found.waiting_bytes)


def test_next_block_comes_to_a_gpu_ahead_only_where_all_streams_have_room_beside_it(tiny):
    plan = _with_blocks(tiny, [[(8192, 96)], [(4096, 96)]], "quantized")
    around = Surroundings(workers=1, idle_bytes=0, has_device=True)
    roomy = plan_memory(bundle_of([plan]), around, Budgets())
    assert roomy.brings_ahead and roomy.worker["pinned slots"] == 64 << 20
    assert roomy.device["next block"] == block_needs(plan, plan.blocks[1]).source
    # On the way to the dtype of the streams tensors of another are there beside what they become.
    assert block_needs(plan, plan.blocks[1]).recast == 0
    half = dataclasses.replace(plan, compute_dtype="bfloat16")
    assert block_needs(half, plan.blocks[1]).recast == 4 * 4096 * 96
    size = sum(roomy.device.values())
    assert plan_memory(bundle_of([plan]), around, Budgets(device=size)).brings_ahead
    tight = plan_memory(bundle_of([plan]), around, Budgets(device=size - 1))
    assert (tight.brings_ahead, tight.pipelines, tight.waiting_bytes) == (False, True, 0)
    assert "next block" not in tight.device
    without = Surroundings(workers=1, idle_bytes=0)
    assert not plan_memory(bundle_of([plan]), without, Budgets()).brings_ahead


def test_units_without_data_have_no_block_live(tiny):
    """Rounding holds three parts of a block, and two shards; nothing is run."""
    none = {"calibration_digest": None, "evaluation_digest": None}
    plan = dataclasses.replace(tiny, **none)
    found = plan_memory(bundle_of([plan]), _AROUND[0], Budgets()).worker
    assert not {"block", "working", "statistics", "activations"} & {
        name for name, size in found.items() if size
    }
    needs = unit_needs(plan)
    pairs = zip([0, *(unit.made for unit in needs)], needs, strict=False)
    worst = max(before + unit.made + unit.source + unit.solve for before, unit in pairs)
    assert sum(found.values()) == _AROUND[0].idle_bytes + records_needs(plan) + worst


def test_shard_on_its_way_to_s3_is_held_by_the_client(tiny):
    assert writing_needs(tiny) == 0
    far = dataclasses.replace(tiny, output="s3://models/quantized")
    largest = max(sum(spec_bytes(spec) for spec in unit.tensors) for unit in tiny.units)
    assert writing_needs(far) == largest


def test_budgets_are_those_of_the_request_before_those_of_the_machine(tmp_path):
    options = tiny_options(tmp_path, worker_memory="2GB", object_store_memory="3 MiB")
    room = Room(worker_bytes=10, store_bytes=20)
    assert budgets_from(options, room) == Budgets(worker=2 * 10**9, device=None, store=3 * 2**20)
    assert budgets_from(tiny_options(tmp_path), room) == Budgets(worker=10, device=None, store=20)


@pytest.mark.parametrize("wrong", ["2 apples", "0", "-3GB", "GB", "1..5GB"])
def test_amount_of_memory_that_is_none_is_refused(tmp_path, wrong):
    with pytest.raises(RecipeError, match="worker_memory must be an amount such as 24GB"):
        tiny_options(tmp_path, worker_memory=wrong)
