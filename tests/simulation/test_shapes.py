"""Sizes of models: against published totals, the design's table of flops, and what the planner makes."""

import dataclasses
import json

import pytest

from quantlib.checkpoint.index import open_checkpoint
from quantlib.errors import RecipeError
from quantlib.job.options import options_from
from quantlib.job.planner import build_plan
from quantlib.machine import cell_tokens
from quantlib.schemes import scheme_from_name
from quantlib.simulation.config_shapes import SHIPPED, shape_of_config, shipped_config, shipped_shape
from quantlib.simulation.costs import Costs, Workload
from quantlib.simulation.hardware import GPU_KINDS, Rates, assumed_rates
from quantlib.simulation.prediction import CELL_TOKENS
from quantlib.simulation.shapes import GroupShape, shape_of_plan
from quantlib.storage import open_store
from tests.support.tiny_jobs import tiny_options

W4 = scheme_from_name("W4A16", 128)
# safetensors metadata of meta-llama/Llama-3.1-70B and -405B; DeepSeek-V3's README gives 671B without the
# module that predicts a second token; the model card of bigscience/bloom.
PUBLISHED = {
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "deepseek-v3": 671.0e9,
    "bloom-176b": 176_247_271_424,
}


def shape_of(name):
    return shape_of_config(name, shipped_config(name), W4)


@pytest.mark.parametrize("name", SHIPPED)
def test_parameters_are_the_published_number(name):
    parameters = shape_of(name).source_bytes / 2
    assert parameters == pytest.approx(PUBLISHED[name], rel=1e-4 if name == "deepseek-v3" else 0)


def test_deepseek_activates_the_published_parameters():
    shape = shape_of("deepseek-v3")
    # 36.6 B with the head of 0.9 B, without the embedding; of its blocks' biases and norms none is counted.
    active = sum(block.passed_weights for block in shape.blocks) + shape.tail_bytes / 2
    assert active == pytest.approx(36.6e9, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "blocks", "params", "forward", "statistics", "factor", "solve"),
    [
        ("llama-3.1-70b", 80, 0.856e9, 1.46e17, 0.86e17, 6.7e14, 9.5e14),
        ("llama-3.1-405b", 126, 3.188e9, 8.51e17, 4.81e17, 6.9e15, 1.06e16),
    ],
)
def test_flops_are_those_of_the_table(name, blocks, params, forward, statistics, factor, solve):
    shape = shape_of(name)
    # Rates of 1 make seconds flops.
    rates = Rates(matrix_flops=1.0, factor_flops=1.0, solve_flops=1.0, column_s=0.0, host_bytes_per_s=1.0)
    costs = Costs(shape=shape, workload=Workload(sequences=512), rates=rates)
    tokens = 512 * 2048
    forwards = sum(costs.forward_s(block, tokens) for block in shape.blocks)
    captures = sum(costs.capture_s(block, tokens) for block in shape.blocks)
    solves = sum(
        costs.prepare_s(group) + costs.tiles_s(group) for block in shape.blocks for group in block.groups
    )
    assert len(shape.blocks) == blocks
    assert sum(group.weights for group in shape.blocks[0].groups) == pytest.approx(params, rel=1e-3)
    assert forwards == pytest.approx(forward, rel=5e-3)
    assert captures - forwards == pytest.approx(statistics, rel=5e-3)
    assert solves == pytest.approx(factor + solve, rel=1e-2)


def test_output_is_as_large_as_the_design_says():
    assert shape_of("llama-3.1-405b").output_bytes == pytest.approx(216e9, rel=5e-3)
    assert shape_of("llama-3.1-70b").output_bytes == pytest.approx(40e9, rel=2e-2)


def _plain(group: GroupShape) -> GroupShape:
    """What is alike, without method and scheme: a configuration knows only one."""
    assert group.likeness is not None
    return dataclasses.replace(group, likeness=dataclasses.replace(group.likeness, method=None, scheme=None))


def test_planned_checkpoint_has_the_shapes_of_its_config(tmp_path):
    options = dataclasses.replace(tiny_options(tmp_path), calibration=None, evaluation=None)
    plan, _ = build_plan(options, threads=1)
    checkpoint = open_checkpoint(open_store(plan.source), plan.source)
    sizes = {name: entry.end - entry.start for name, entry in checkpoint.tensors.items()}
    planned = shape_of_plan(plan, checkpoint.config, sizes)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    derived = shape_of_config("tiny", config, scheme_from_name("W4A16", 32))
    assert [list(map(_plain, x.groups)) for x in planned.blocks] == [list(x.groups) for x in derived.blocks]
    for name in ("other_weights", "attention_width", "source_bytes"):
        assert {getattr(x, name) for x in planned.blocks} == {getattr(x, name) for x in derived.blocks}, name
    assert planned.hidden == derived.hidden and planned.vocabulary == derived.vocabulary
    # A shard has a header, which is large only beside tiny tensors.
    assert 0 < planned.output_bytes - derived.output_bytes < 4096 * (len(plan.units))


def test_linears_without_calibration_cost_a_forward_only(tmp_path):
    options = tiny_options(tmp_path, rules=[{"match": "*.down_proj", "method": "rtn"}])
    plan, _ = build_plan(dataclasses.replace(options, calibration=None, evaluation=None), threads=1)
    checkpoint = open_checkpoint(open_store(plan.source), plan.source)
    sizes = {name: entry.end - entry.start for name, entry in checkpoint.tensors.items()}
    block = shape_of_plan(plan, checkpoint.config, sizes).blocks[0]
    assert len(block.groups) == 3
    assert block.other_weights == 64 * 96
    assert block.passed_weights == sum(x.rows * x.columns for x in plan.blocks[0].linears)


def test_cells_are_those_of_a_gpu():
    assert cell_tokens("cuda") == CELL_TOKENS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "shapes:gpt-5"}, "no shapes of 'gpt-5'; shipped are shapes:llama-3.1-70b"),
        ({"method": "rtn"}, "found method rtn; leave it out"),
        ({"rules": [{"match": "*", "keep": True}]}, "found rules; leave it out"),
        ({"target": "vllm"}, "found target vllm; leave it out"),
    ],
)
def test_what_shapes_cannot_tell_is_refused(changes, said):
    values = {"source": "shapes:llama-3.1-70b", "output": "x", "calibration": "x", **changes}
    with pytest.raises(RecipeError, match=said):
        shipped_shape(options_from(values))


def test_assumed_rates_of_an_h100_are_those_of_the_design():
    rates = assumed_rates(GPU_KINDS["H100"])
    found = (
        rates.matrix_flops,
        rates.factor_flops,
        rates.solve_flops,
        rates.column_s,
        rates.host_bytes_per_s,
    )
    assert found == pytest.approx((500e12, 25e12, 40e12, 2e-6, 50e9))
