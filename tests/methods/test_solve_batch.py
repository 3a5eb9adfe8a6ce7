"""Row tiles of several input groups solved as one batch: the bits and figures that each has alone."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import NumericsError
from quantlib.methods import METHODS, column_tile
from quantlib.schemes import WHOLE_ROW, WeightScheme
from quantlib.solver_settings import SolverSettings
from tests.support.reference_solver import correlated_inputs, solve_reference
from tests.support.solver_strategies import solvers

pytestmark = pytest.mark.usefixtures("one_thread")

_KINDS = ("usual", "usual", "usual", "no tokens", "constant", "more damping", "not factored", "dead columns")

schemes = st.builds(
    WeightScheme,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    is_symmetric=st.booleans(),
    group_size=st.sampled_from([16, 64, WHOLE_ROW]),
)


@functools.lru_cache(maxsize=64)
def _hessian(columns: int, seed: int, kind: str) -> tuple[torch.Tensor, int]:
    """Of an expert, and its tokens."""
    num_tokens = 3 * columns + 8
    x = correlated_inputs(num_tokens, columns, seed)
    hessian_CC = torch.from_numpy(x.T @ x).float()
    if kind == "no tokens":
        return torch.zeros(columns, columns), 0
    if kind == "constant":
        return torch.zeros(columns, columns), num_tokens
    if kind == "more damping" and columns > 1:
        # Two columns that are more alike than they can be: too much for the first damping, not for more.
        size = hessian_CC.diagonal().mean()
        hessian_CC[:2], hessian_CC[:, :2] = 0, 0
        hessian_CC[:2, :2] = torch.tensor([[size, 1.2 * size], [1.2 * size, size]])
    if kind == "not factored":
        hessian_CC = torch.full((columns, columns), 100.0).fill_diagonal_(1.0)
    if kind == "dead columns":
        hessian_CC[::3], hessian_CC[:, ::3] = 0, 0
        hessian_CC[-1, -1] += 1.0
    return hessian_CC, num_tokens


def _expert(rows: tuple[int, ...], columns: int, seed: int, kind: str, solver: SolverSettings):
    """What is prepared of an expert, anew each time, and the weights of its linears."""
    hessian_CC, num_tokens = _hessian(columns, seed, kind)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"{seed}.{number}": (torch.randn(count, columns, generator=generator) * 0.05).bfloat16()
        for number, count in enumerate(rows)
    }
    prepared = METHODS["gptq"].prepare(
        hessian_CC=hessian_CC, cross_CC=None, num_tokens=num_tokens, solver=solver
    )
    return prepared, weights


def _assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, rows in wanted.items():
        mine, other = found[name].quantized, rows.quantized
        assert torch.equal(mine.codes_RC, other.codes_RC)
        assert torch.equal(mine.scale_RG, other.scale_RG)
        assert (mine.zero_RG is None) == (other.zero_RG is None)
        assert mine.zero_RG is None or torch.equal(mine.zero_RG, other.zero_RG)
        # What is counted and added up for the report, to the last bit.
        figures = [dataclasses.replace(x, quantized=None) for x in (found[name], rows)]
        assert figures[0] == figures[1]


def _assert_batches_change_nothing(experts, rows, columns, scheme, solver, batches):
    def fresh(number: int):
        return _expert(rows, columns, *experts[number], solver)

    given_ = {"scale_dtype": torch.bfloat16}
    alone = []
    for number in range(len(experts)):
        prepared, weights = fresh(number)
        alone.append(prepared.solve(weights, scheme, **given_))
    for batch in batches:
        made = [fresh(number) for number in batch]
        solved = METHODS["gptq"].solve_batch([x[0] for x in made], [x[1] for x in made], scheme, **given_)
        for number, found in zip(batch, solved, strict=True):
            _assert_same(found, alone[number])
    return alone


@settings(max_examples=60, deadline=None)
@given(
    experts=st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from(_KINDS)),
        min_size=1,
        max_size=6,
        unique_by=lambda x: x[0],
    ),
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    columns=st.integers(1, 300),
    scheme=schemes,
    solver=solvers,
    data=st.data(),
)
def test_experts_of_any_batch_have_the_codes_and_figures_of_single_ones(
    experts, rows, columns, scheme, solver, data
):
    order = data.draw(st.permutations(range(len(experts))))
    cut = data.draw(st.integers(0, len(experts)))
    _assert_batches_change_nothing(experts, rows, columns, scheme, solver, (order[:cut], order[cut:]))


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("rows", [(48,), (96, 16), (1040,)])
def test_experts_of_several_column_batches_and_vectors_are_those_of_single_ones(rows, is_symmetric):
    experts = list(enumerate(["usual", "more damping", "no tokens", "usual"]))
    scheme = WeightScheme(bits=4, is_symmetric=is_symmetric, group_size=128)
    solver, batches = SolverSettings(descent_passes=1), [(3, 0, 1, 2), (1, 3)]
    alone = _assert_batches_change_nothing(experts, rows, 384, scheme, solver, batches)
    said = [next(iter(found.values())).circumstances for found in alone]
    assert [x.fallback for x in said] == [None, "more_damping", "rtn_no_tokens", None]
    assert [x.damping_attempts > 1 for x in said] == [False, True, False, False]


@settings(max_examples=10, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=2, max_size=4, unique=True),
    rows=st.integers(1, 6),
    columns=st.integers(2, 60),
    is_symmetric=st.booleans(),
    widths=st.tuples(st.sampled_from([1, 7, 16]), st.sampled_from([3, 24, 128])),
)
def test_every_expert_of_a_batch_equals_the_published_algorithm(seeds, rows, columns, is_symmetric, widths):
    """In float64, each against a slow loop with its own Hessian and its own order of columns."""
    scheme = WeightScheme(bits=4, is_symmetric=is_symmetric, group_size=8)
    solver, prepared, tiles, hessians = SolverSettings(scale_search="minmax"), [], [], []
    for seed in seeds:
        x = correlated_inputs(3 * columns + 8, columns, seed)
        hessians.append(torch.from_numpy(x.T @ x))
        weight = np.random.default_rng(seed).normal(size=(rows, columns)) * 0.3
        tiles.append({str(seed): torch.from_numpy(weight)})
        prepared.append(
            METHODS["gptq"].prepare(hessian_CC=hessians[-1], cross_CC=None, num_tokens=10**9, solver=solver)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_tile, "LEAF_COLUMNS", widths[0])
        patch.setattr(column_tile, "BATCH_COLUMNS", widths[1])
        solved = METHODS["gptq"].solve_batch(prepared, tiles, scheme, scale_dtype=torch.bfloat16)
    for seed, tile, hessian_CC, found in zip(seeds, tiles, hessians, solved, strict=True):
        quantized = found[str(seed)].quantized
        zero = torch.full(quantized.scale_RG.shape, scheme.middle_code)
        reference = solve_reference(
            tile[str(seed)].numpy(),
            hessian_CC.numpy(),
            quantized.scale_RG.double().numpy(),
            (zero if quantized.zero_RG is None else quantized.zero_RG).numpy(),
            group_width=8,
            num_codes=16,
            damping=0.002 * hessian_CC.diagonal().mean().item(),
        )
        assert np.array_equal(quantized.codes_RC.numpy(), reference.codes)


def test_batch_with_a_weight_that_is_not_finite_names_the_linear():
    solver, scheme = SolverSettings(), WeightScheme(bits=4, is_symmetric=True, group_size=8)
    made = [_expert((8,), 24, seed, "usual", solver) for seed in range(3)]
    made[1][1]["1.0"][3, 5] = float("nan")
    with pytest.raises(NumericsError, match="finite") as caught:
        METHODS["gptq"].solve_batch(
            [x[0] for x in made], [x[1] for x in made], scheme, scale_dtype=torch.bfloat16
        )
    assert caught.value.facts["linear"] == "1.0"


def test_rounded_experts_of_a_batch_are_those_of_single_ones():
    scheme = WeightScheme(bits=4, is_symmetric=False, group_size=32)
    given_ = {"hessian_CC": None, "cross_CC": None, "num_tokens": 0, "solver": SolverSettings()}
    prepared = [METHODS["rtn"].prepare(**given_) for _ in range(3)]
    tiles = [_expert((20,), 70, seed, "usual", SolverSettings())[1] for seed in range(3)]
    solved = METHODS["rtn"].solve_batch(prepared, tiles, scheme, scale_dtype=torch.float16)
    for one, tile, found in zip(prepared, tiles, solved, strict=True):
        _assert_same(found, one.solve(tile, scheme, scale_dtype=torch.float16))
