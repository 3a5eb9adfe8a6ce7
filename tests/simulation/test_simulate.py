"""Jobs in virtual time: closed forms, the design's GPU-hours, and what must hold whatever the cluster."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.schemes import scheme_from_name
from quantlib.simulation.config_shapes import shape_of_config, shipped_config
from quantlib.simulation.costs import Costs, Workload
from quantlib.simulation.hardware import parse_cluster
from quantlib.simulation.shapes import BlockShape, GroupShape, ModelShape
from quantlib.simulation.simulate import simulate
from quantlib.simulation.timeline import IDLE

FREE = math.inf
W4 = scheme_from_name("W4A16", 128)


def shape(num_blocks=3, columns=(256, 512), rows=512):
    groups = tuple(GroupShape(columns=c, tiles=(rows,)) for c in columns)
    block = BlockShape(
        groups=groups,
        other_weights=0,
        attention_width=256.0,
        source_bytes=2 * sum(group.weights for group in groups),
        output_bytes=sum(group.weights for group in groups) // 2,
    )
    return ModelShape(
        name="small",
        blocks=(block,) * num_blocks,
        hidden=256,
        vocabulary=1000,
        prelude_bytes=512_000,
        tail_bytes=512_512,
    )


def cluster(text="H100", *, network=FREE, storage=FREE, host=FREE):
    """Links that cost nothing unless named."""
    found = parse_cluster(text, network="1GB/s", storage="1GB/s")
    rates = dataclasses.replace(found.rates, host_bytes_per_s=host)
    return dataclasses.replace(found, network_bytes_per_s=network, storage_bytes_per_s=storage, rates=rates)


def work(**changes):
    values = {"sequences": 64, "sequence_length": 256, "sequences_per_cell": 8, "checkpoint_every": 0}
    return Workload(**{**values, **changes})


def total_costs(model, workload, where):
    """Seconds of computation that the job is made of, by stage."""
    costs = Costs(shape=model, workload=workload, rates=where.rates)
    calibration = workload.cells(workload.sequences)
    evaluation = workload.cells(workload.evaluation_sequences)
    is_quantized = workload.propagation == "quantized"
    capture = sum(costs.capture_s(block, tokens) for block in model.blocks for tokens in calibration)
    solve = sum(
        costs.prepare_s(group) + costs.tiles_s(group) for block in model.blocks for group in block.groups
    )
    forwards = [*evaluation, *evaluation, *(calibration if is_quantized else [])]
    evaluate = sum(costs.forward_s(block, tokens) for block in model.blocks for tokens in forwards)
    return capture, solve, evaluate + sum(costs.score_s(tokens) for tokens in evaluation)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sequences": 61},
        {"evaluation_sequences": 12},
        {"propagation": "quantized", "evaluation_sequences": 8},
        {"propagation": "quantized", "correct_targets": True, "descent_passes": 2},
    ],
)
def test_one_gpu_takes_the_sum_of_all_costs(changes):
    model, workload, where = shape(), work(**changes), cluster()
    outcome = simulate(model, workload, where)
    assert outcome.wall_s == pytest.approx(sum(total_costs(model, workload, where)))
    assert outcome.timeline.busy_s == pytest.approx(outcome.wall_s)
    assert outcome.network_bytes == 0


def test_captures_are_split_evenly_when_nothing_else_costs():
    model, workload = shape(columns=()), work()
    model = dataclasses.replace(
        model, blocks=tuple(dataclasses.replace(block, other_weights=10**6) for block in model.blocks)
    )
    alone = simulate(model, workload, cluster()).wall_s
    for gpus in (2, 4, 8):
        assert simulate(model, workload, cluster(f"{gpus}xH100")).wall_s == pytest.approx(alone / gpus)


def test_more_gpus_than_cells_have_nothing_to_do():
    model, workload = shape(columns=(64,)), work()
    at_8, at_64 = (simulate(model, workload, cluster(f"{gpus}xH100")) for gpus in (8, 64))
    assert at_64.wall_s == pytest.approx(at_8.wall_s, rel=0.05)
    assert max(at_64.timeline.causes().items(), key=lambda found: found[1])[0] == IDLE


def test_slow_storage_takes_bytes_over_bandwidth():
    model, rate = shape(num_blocks=20), 1000.0
    outcome = simulate(model, work(), cluster(storage=rate))
    # The storage lane of the only worker does one thing at a time, and is never idle.
    assert outcome.wall_s == pytest.approx((model.source_bytes + model.output_bytes) / rate)
    assert outcome.read_bytes == model.source_bytes
    assert outcome.written_bytes == model.output_bytes
    causes = outcome.timeline.causes()
    assert causes["read"] + causes["write"] == pytest.approx(outcome.wall_s, rel=1e-3)


def test_reads_of_some_workers_go_on_while_one_writes():
    model, rate = shape(num_blocks=200), 1000.0
    outcome = simulate(model, work(), cluster("8xH100", storage=rate))
    assert outcome.wall_s < (model.source_bytes + 0.5 * model.output_bytes) / rate
    assert outcome.wall_s > model.source_bytes / rate


def test_block_is_solved_only_when_the_shard_before_is_written():
    model = shape(num_blocks=3)
    blocks = tuple(dataclasses.replace(block, source_bytes=0) for block in model.blocks)
    model = dataclasses.replace(model, blocks=blocks, prelude_bytes=0, tail_bytes=0)
    workload, where = work(), cluster(storage=1000.0)
    capture, solve, _ = total_costs(model, workload, where)
    written = model.output_bytes / 1000.0
    assert written > 1000 * (capture + solve)
    # Captures but the first hide behind writes; solves do not.
    expected = written + capture / 3 + solve
    assert simulate(model, workload, where).wall_s - expected == pytest.approx(0, abs=1e-3 * solve)


def test_two_nodes_read_twice_as_fast():
    model = shape(num_blocks=20)
    one, two = (
        simulate(model, work(), cluster(text, storage=1e3)).wall_s for text in ("1x8xH100", "2x8xH100")
    )
    assert two < 0.6 * one


def test_sums_of_other_nodes_come_over_the_network():
    model = shape(num_blocks=1, columns=(512,))
    outcome = simulate(model, work(), cluster("2x4xH100", network=1e3))
    # One a node, half of it each way; and the half that is on the other node to whoever solves.
    sums = 1.5 * 4 * 512**2
    # Besides, half of the weights goes each way, of what stands before the block and of the block.
    weights = model.prelude_bytes + model.blocks[0].source_bytes
    assert outcome.network_bytes == pytest.approx(sums + weights)
    # Both ways at once, and then one way.
    assert outcome.wall_s > (0.5 + 0.5) * 4 * 512**2 / 1e3


def test_sums_of_two_observers_go_straight_to_whoever_solves():
    model = shape(num_blocks=1, columns=(512,))
    outcome = simulate(model, work(), cluster("2x1xH100", network=1e3))
    weights = model.prelude_bytes + model.blocks[0].source_bytes
    assert outcome.network_bytes == pytest.approx(4 * 512**2 + weights)


def test_next_block_is_begun_while_the_last_one_is_solved_on_original_activations_only():
    model = shape(num_blocks=12, columns=(2048,), rows=4096)
    where = cluster("4xH100")
    original = simulate(model, work(), where)
    quantized = simulate(model, work(propagation="quantized"), where)
    capture, solve, _ = total_costs(model, work(), where)
    assert original.wall_s < capture / 4 + solve
    assert quantized.wall_s > capture / 4 + solve


def test_checkpoints_cost_what_they_write():
    where = cluster(storage=1e9)
    without = simulate(shape(), work(), where)
    kept = simulate(shape(), work(checkpoint_every=1), where)
    streams = 64 * 256 * 256 * 2
    copied = simulate(shape(), work(checkpoint_every=1), cluster(host=1e9)).timeline.seconds["copy"]
    not_copied = simulate(shape(), work(), cluster(host=1e9)).timeline.seconds["copy"]
    assert copied - not_copied == pytest.approx(2 * streams / 1e9)
    assert kept.written_bytes - without.written_bytes == 2 * streams
    assert kept.wall_s > without.wall_s


def test_rounding_without_data_is_one_pass_of_storage():
    model = shape(columns=())
    model = dataclasses.replace(
        model, blocks=tuple(dataclasses.replace(block, source_bytes=10**6) for block in model.blocks)
    )
    outcome = simulate(model, work(sequences=0), cluster("2xH100", storage=1e3))
    assert outcome.read_bytes == model.source_bytes
    assert outcome.timeline.busy_s == 0
    assert outcome.wall_s >= model.source_bytes / 1e3


@pytest.mark.parametrize(
    ("name", "bound", "found"), [("llama-3.1-70b", 0.15, 0.16), ("llama-3.1-405b", 0.90, 0.98)]
)
def test_one_h100_needs_the_design_s_gpu_hours(name, bound, found):
    model = shape_of_config(name, shipped_config(name), W4)
    where = parse_cluster("H100", network="100Gbps", storage="2GB/s")
    outcome = simulate(model, Workload(sequences=512, checkpoint_every=0), where)
    # The bound counts the column loop once a linear, the product once a row tile.
    groups = [group for block in model.blocks for group in block.groups]
    loops_s = where.rates.column_s * sum(group.columns * (len(group.tiles) - 1) for group in groups)
    assert (outcome.timeline.busy_s - loops_s) / 3600 == pytest.approx(bound, abs=0.005)
    # Beyond it: these, copies to and from the host, the first read, the last write.
    assert outcome.wall_s / 3600 == pytest.approx(found, abs=0.005)


SMALL_CLUSTERS = st.builds(
    cluster,
    st.sampled_from(["H100", "2xH100", "3xH100", "2x3xH100", "3x4xH100"]),
    network=st.sampled_from([1e6, 1e9, FREE]),
    storage=st.sampled_from([1e6, 1e9, FREE]),
    host=st.sampled_from([1e8, 1e10, FREE]),
)
WORKLOADS = st.builds(
    work,
    sequences=st.integers(1, 40),
    evaluation_sequences=st.integers(0, 20),
    propagation=st.sampled_from(["original", "quantized"]),
    descent_passes=st.integers(0, 1),
    checkpoint_every=st.sampled_from([0, 1, 2]),
)
MODELS = st.builds(
    shape,
    num_blocks=st.integers(1, 4),
    columns=st.lists(st.sampled_from([32, 256, 1024]), max_size=4).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(model=MODELS, workload=WORKLOADS, where=SMALL_CLUSTERS)
def test_work_is_conserved_and_time_accounted_for(model, workload, where):
    outcome = simulate(model, workload, where)
    expected = total_costs(model, workload, where)
    found = [outcome.timeline.seconds.get(stage, 0.0) for stage in ("capture", "solve", "evaluate")]
    assert found == pytest.approx(expected)
    assert sum(outcome.timeline.causes().values()) == pytest.approx(outcome.wall_s)
    assert sum(outcome.timeline.seconds.values()) <= outcome.wall_s * where.num_workers * (1 + 1e-9)
    assert outcome.wall_s >= sum(expected) / where.num_workers * (1 - 1e-9)
    assert outcome.read_bytes == pytest.approx(model.source_bytes)
    assert outcome.written_bytes >= model.output_bytes * (1 - 1e-9)


# Lists of work done in another order may end a little later on faster machines (Graham's anomalies).
@settings(max_examples=60, deadline=None)
@given(model=MODELS, workload=WORKLOADS, where=SMALL_CLUSTERS, factor=st.sampled_from([1.5, 4.0]))
@pytest.mark.parametrize("what", ["network", "storage", "gpu"])
def test_faster_parts_never_make_a_job_much_slower(what, model, workload, where, factor):
    if what == "gpu":
        values = {name: value * factor for name, value in dataclasses.asdict(where.rates).items()}
        values["column_s"] = where.rates.column_s / factor
        better = dataclasses.replace(where, rates=type(where.rates)(**values))
    else:
        field = f"{what}_bytes_per_s"
        better = dataclasses.replace(where, **{field: getattr(where, field) * factor})
    assert simulate(model, workload, better).wall_s <= simulate(model, workload, where).wall_s * 1.25
