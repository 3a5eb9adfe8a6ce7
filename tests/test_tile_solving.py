"""A group solved in tiles, whoever solves which: the packed bytes and report rows of one solver."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.calibration.totals import Total, exponent_for
from quantlib.errors import NumericsError
from quantlib.group_solver import GroupSolver
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.packing import FORMATS
from quantlib.schemes import has_own_groups, scheme_from_name
from quantlib.solver_settings import DEFAULT_SOLVER, SolverSettings
from tests.support.linear_plans import linear_plan
from tests.support.partials import cross_product, gram_lower, panels_from

COLUMNS, TOKENS = 96, 400
COUNTED = GroupTokens(own=TOKENS)
CPU = torch.device("cpu")
W4 = scheme_from_name("W4A16", 32)
_OPTIONS = {
    "plain": {},
    "minmax": {"scale_search": "minmax"},
    "mse": {"scale_search": "mse"},
    "inverse": {"scale_search": "inverse-hessian"},
    "natural": {"column_order": "natural"},
    "group-aware": {"column_order": "group-aware"},
    "descent": {"descent_passes": 2},
    "refit": {"refits_scales": True},
    "both": {"descent_passes": 1, "refits_scales": True},
    "outliers": {"outlier_columns": 3},
    "weights": {"outlier_weights": 30},
    "weights and both": {"outlier_weights": 50, "descent_passes": 1, "refits_scales": True},
    "outliers and both": {"outlier_columns": 5, "descent_passes": 1, "refits_scales": True},
}


def _linear(name: str, rows: int, scheme=W4, method: str = "gptq") -> LinearPlan:
    return linear_plan(name, rows, COLUMNS, scheme, method=method)


def _scheme(text: str):
    """Of a name, or a name and a group size; integers have groups of 32 by default."""
    name, _, size = text.partition("@")
    return scheme_from_name(name, int(size) if size else None if has_own_groups(name) else 32)


def _block(*linears: LinearPlan) -> BlockPlan:
    names = tuple(linear.name for linear in linears)
    return BlockPlan(index=0, prefix="b", tensors=(), linears=linears, input_groups=(names,))


def _tensors(block: BlockPlan, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{linear.name}.weight": (torch.randn(linear.rows, COLUMNS, generator=generator) * 0.05).bfloat16()
        for linear in block.linears
    }


def _total(product_CC: torch.Tensor, *, is_whole: bool) -> Total:
    total = Total.zeros(COLUMNS, exponent_for(float(product_CC.abs().max()), 1), is_whole=is_whole)
    total.add_(panels_from(product_CC, is_whole=is_whole))
    return total


def _statistics(*, corrects: bool) -> list[list[Total]]:
    generator = torch.Generator().manual_seed(1)
    x_NC = torch.randn(TOKENS, COLUMNS, generator=generator)
    x_NC = x_NC @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 8
    reference_NC = x_NC + 0.1 * torch.randn(TOKENS, COLUMNS, generator=generator)
    crosses = [_total(cross_product(reference_NC, x_NC), is_whole=True)] if corrects else []
    return [[_total(gram_lower(x_NC), is_whole=False)], crosses, []]


def _solver(height: int | None, options: SolverSettings = DEFAULT_SOLVER, layout="compressed-tensors"):
    return GroupSolver(FORMATS[layout], options, CPU, height)


def _assert_same(found, wanted):
    (packed, rows), (wanted_packed, wanted_rows) = found, wanted
    assert packed.keys() == wanted_packed.keys()
    assert all(torch.equal(packed[name], wanted_packed[name]) for name in packed)
    assert rows == wanted_rows


def _shared_out(data, block, given, height, settings_, layout) -> tuple:
    """Tiles in any order over up to three solvers; one of them packs."""
    solvers = [_solver(height, settings_, layout) for _ in range(data.draw(st.integers(1, 3)))]
    tiles = solvers[0].tiles(block)[0]
    solved = {}
    for tile in data.draw(st.permutations(tiles)):
        solver = data.draw(st.sampled_from(solvers))
        solved[tile.number] = solver.solve_tile(block, tile, *given)
    packer = data.draw(st.sampled_from(solvers))
    return packer.pack(block, 0, [solved[tile.number] for tile in tiles], given[2])


@pytest.mark.parametrize("name", _OPTIONS)
@settings(max_examples=4, deadline=None)
@given(
    rows=st.lists(st.integers(1, 90), max_size=2),
    height=st.sampled_from([16, 32, 64]),
    scheme=st.sampled_from(
        ["W4A16", "W4A16_ASYM", "W3A16", "W8A16", "W8A16_ASYM@0", "NVFP4A16", "FP8A16_TENSOR", "FP8A16_BLOCK"]
    ),
    corrects=st.booleans(),
    data=st.data(),
)
def test_tiles_of_any_solvers_give_the_bytes_and_figures_of_one(name, rows, height, scheme, corrects, data):
    options = SolverSettings(**_OPTIONS[name])
    counts = [height + 20, *rows]
    block = _block(*(_linear(str(n), rows, _scheme(scheme)) for n, rows in enumerate(counts)))
    given_ = (_tensors(block), _statistics(corrects=corrects), COUNTED)
    alone = _solver(height, options).solve(block, 0, *given_)
    _assert_same(_shared_out(data, block, given_, height, options, "compressed-tensors"), alone)
    uncut, uncut_rows = _solver(1024, options).solve(block, 0, *given_)
    assert all(torch.equal(alone[0][name], uncut[name]) for name in uncut)
    # Sums of other parts are rounded elsewhere.
    for row, uncut_row in zip(alone[1], uncut_rows, strict=True):
        for figure, value in uncut_row.items():
            is_sum = "error" in figure and value is not None
            assert row[figure] == (pytest.approx(value, rel=1e-5) if is_sum else value), figure


@settings(max_examples=6, deadline=None)
@given(data=st.data(), height=st.sampled_from([16, 48]))
def test_tiles_of_mixed_methods_and_schemes_are_packed_in_either_layout(data, height):
    eight = scheme_from_name("W8A16", 32)
    block = _block(_linear("q", 64), _linear("k", 96, eight), _linear("v", 32), _linear("g", 64, W4, "rtn"))
    given_ = (_tensors(block), _statistics(corrects=False), COUNTED)
    for layout in ("compressed-tensors", "gptq"):
        alone = _solver(height, layout=layout).solve(block, 0, *given_)
        _assert_same(_shared_out(data, block, given_, height, DEFAULT_SOLVER, layout), alone)
        assert [row["name"] for row in alone[1]] == ["q", "k", "v", "g"]
        assert [row["method"] for row in alone[1]] == ["gptq"] * 3 + ["rtn"]


@pytest.mark.parametrize("kind", ["no tokens", "constant", "not factored"])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_tiles_that_are_rounded_say_why_in_one_row(kind, data):
    block = _block(_linear("q", 80), _linear("k", 16))
    zeros_CC = torch.zeros(COLUMNS, COLUMNS)
    # Far from positive definite however much the diagonal is raised or the rest shrunk.
    wild_CC = torch.full((COLUMNS, COLUMNS), 100.0).fill_diagonal_(1.0).tril()
    statistics = {
        "no tokens": ([[], [], []], GroupTokens(own=0)),
        "constant": ([[_total(zeros_CC, is_whole=False)], [], []], COUNTED),
        "not factored": ([[_total(wild_CC, is_whole=False)], [], []], COUNTED),
    }
    given_ = (_tensors(block), *statistics[kind])
    alone = _solver(16).solve(block, 0, *given_)
    _assert_same(_shared_out(data, block, given_, 16, DEFAULT_SOLVER, "compressed-tensors"), alone)
    fallbacks = {"no tokens": "rtn_no_tokens", "constant": "rtn_constant_inputs"}
    assert {row["fallback"] for row in alone[1]} == {fallbacks.get(kind, "rtn_not_factored")}


def test_tile_with_a_weight_that_is_not_finite_names_the_linear():
    block = _block(_linear("q", 40))
    tensors = _tensors(block)
    tensors["q.weight"][39, 5] = float("inf")
    solver = _solver(16)
    first, *_, last = solver.tiles(block)[0]
    solver.solve_tile(block, first, tensors, _statistics(corrects=False), COUNTED)
    with pytest.raises(NumericsError, match="finite") as caught:
        solver.solve_tile(block, last, tensors, _statistics(corrects=False), COUNTED)
    assert caught.value.facts["linear"] == "q"


def test_group_is_prepared_once_until_it_is_forgotten():
    """Totals that are not read do not matter: a tile after the first needs none."""
    block = _block(_linear("q", 48))
    solver, given_ = _solver(16), (_tensors(block), _statistics(corrects=False), COUNTED)
    tiles = solver.tiles(block)[0]
    solver.solve_tile(block, tiles[0], *given_)
    later = solver.solve_tile(block, tiles[1], given_[0], None, COUNTED)
    solver.forget()
    with pytest.raises(TypeError):
        solver.solve_tile(block, tiles[1], given_[0], None, COUNTED)
    anew = solver.solve_tile(block, tiles[1], *given_)
    assert torch.equal(later["q"].quantized.codes_RC, anew["q"].quantized.codes_RC)


def test_what_is_prepared_is_that_of_the_block_and_group_at_hand():
    block, statistics = _block(_linear("q", 32)), _statistics(corrects=False)
    following = dataclasses.replace(block, index=1)
    other = [[_total(torch.eye(COLUMNS) * 3.0, is_whole=False)], [], []]
    solver, tensors = _solver(16), _tensors(block)
    tile = solver.tiles(block)[0][0]
    solver.solve_tile(block, tile, tensors, statistics, COUNTED)
    found = solver.solve_tile(following, tile, tensors, other, COUNTED)
    wanted = _solver(16).solve_tile(following, tile, tensors, other, COUNTED)
    assert torch.equal(found["q"].quantized.codes_RC, wanted["q"].quantized.codes_RC)
    assert found["q"].weight_energy == wanted["q"].weight_energy
