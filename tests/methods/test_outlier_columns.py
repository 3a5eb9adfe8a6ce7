"""Columns kept beside the codes: against elimination in float64, by their optimality, to the same bits."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.methods import METHODS
from quantlib.methods.contracts import RTN_NO_TOKENS, RTN_NOT_FACTORED
from quantlib.schemes import scheme_from_name
from quantlib.solver_settings import SolverSettings
from tests.support.reference_elimination import damped_hessian, solving_order
from tests.support.reference_solver import correlated_inputs

gptq = METHODS["gptq"]
TOKENS = 500


def weight(rows=24, columns=96, seed=0, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def hessian(columns=96, seed=0, dtype=torch.float32):
    x = torch.from_numpy(correlated_inputs(TOKENS, columns, seed))
    x[:, [7, 50]] *= 30.0
    return (x.T @ x).to(dtype)


def solved(weight_RC, hessian_CC, count, scheme="W4A16", size=32, tokens=TOKENS, **choices):
    found = gptq(
        {"w": weight_RC},
        {"w": scheme_from_name(scheme, size)},
        hessian_CC=hessian_CC,
        num_tokens=tokens if hessian_CC is not None else 0,
        scale_dtype=torch.bfloat16,
        solver=SolverSettings(outlier_columns=count, **choices),
    )
    return found["w"]


def by_elimination(weight, damped, scale, width, num_codes, order, kept):
    """Column by column in float64; each error goes to all columns left, those kept among them."""
    inverse, running = np.linalg.inv(damped), weight.astype(np.float64)
    codes, half = {}, num_codes // 2
    for column in [c for c in order if c not in kept]:
        step = scale[:, column // width]
        codes[column] = np.clip(np.rint(running[:, column] / step), -half, half - 1)
        error = running[:, column] - codes[column] * step
        running -= np.outer(error / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, running[:, sorted(kept)]


@pytest.mark.parametrize("order", ["activation", "natural", "group-aware"])
def test_kept_columns_take_up_what_rounding_all_others_left(order):
    weight_RC, hessian_CC = weight(dtype=torch.float64), hessian(dtype=torch.float64)
    found = solved(weight_RC, hessian_CC, 4, column_order=order).quantized
    diagonal = hessian_CC.diagonal().numpy()
    kept = sorted(range(96), key=lambda c: (-diagonal[c], c))[:4]
    assert {7, 50} <= set(kept)
    codes, weights = by_elimination(
        weight_RC.numpy(),
        damped_hessian(hessian_CC.numpy(), TOKENS),
        found.scale_RG.double().numpy(),
        32,
        16,
        solving_order(order, hessian_CC.numpy(), 32),
        set(kept),
    )
    assert found.outliers is not None and found.outliers.column_K.tolist() == sorted(kept)
    assert found.outliers.column_K.dtype == torch.int32
    for column, code in codes.items():
        assert np.array_equal(found.codes_RC[:, column].numpy().astype(int) - 8, code), column
    np.testing.assert_allclose(found.outliers.weight_RK.numpy(), weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("choices", [{}, {"descent_passes": 2}, {"descent_passes": 1, "refits_scales": True}])
def test_no_other_weights_of_kept_columns_would_cost_less(choices):
    weight_RC, hessian_CC = weight(dtype=torch.float64), hessian(dtype=torch.float64)
    found = solved(weight_RC, hessian_CC, 1, **choices).quantized
    error_RC = weight_RC - levels64(found)
    damped_CC = torch.from_numpy(damped_hessian(hessian_CC.numpy(), TOKENS))
    # The derivative of the damped loss by a weight that is free.
    slope_R = (error_RC @ damped_CC)[:, found.outliers.column_K.long()]
    scale = (weight_RC @ damped_CC).abs().max()
    assert slope_R.abs().max() < 1e-10 * scale


def energy(x_RC, hessian_CC):
    return ((x_RC.double() @ hessian_CC.double()) * x_RC.double()).sum().item()


def levels64(quantized):
    level_RC = dataclasses.replace(quantized, outliers=None).dequantize().double()
    return quantized.outliers.put_into_(level_RC)


def loss(weight_RC, found, hessian_CC):
    damped_CC = torch.from_numpy(damped_hessian(hessian_CC.double().numpy(), TOKENS))
    return energy(weight_RC - found.quantized.dequantize(), damped_CC)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W3A16", "W2A16_ASYM"])
def test_more_columns_kept_leave_less_error(scheme):
    weight_RC, hessian_CC = weight(64).bfloat16(), hessian()
    errors = [solved(weight_RC, hessian_CC, count, scheme) for count in (0, 2, 8, 32)]
    reports = [found.report.relative_error for found in errors]
    assert reports == sorted(reports, reverse=True) and reports[-1] < 0.5 * reports[0]
    wanted = [
        energy(weight_RC - found.quantized.dequantize(), hessian_CC) / energy(weight_RC, hessian_CC)
        for found in errors
    ]
    assert reports == pytest.approx(wanted, rel=1e-3)


def test_passes_and_refits_never_raise_the_loss():
    weight_RC, hessian_CC = weight(64), hessian()
    plain, refitted, both = (
        loss(weight_RC, solved(weight_RC, hessian_CC, 3, "W3A16", **choices), hessian_CC)
        for choices in ({}, {"refits_scales": True}, {"refits_scales": True, "descent_passes": 2})
    )
    assert both < refitted < plain


@pytest.mark.parametrize("search", ["minmax", "absmax", "mse", "hessian", "inverse-hessian"])
def test_scales_need_not_suit_kept_columns(search):
    weight_RC, hessian_CC = weight(), hessian()
    huge_RC = weight_RC.clone()
    huge_RC[:, [7, 50]] *= 100.0
    one, other = (
        solved(w, hessian_CC, 2, scale_search=search).quantized.scale_RG for w in (weight_RC, huge_RC)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_columns_are_in_the_dtype_of_the_weight_and_count_as_clipped_nowhere(dtype):
    weight_RC = weight(dtype=dtype)
    before = solved(weight_RC, hessian(), 2).report.clipped_fraction
    weight_RC[:, [7, 50]] *= 100.0
    found = solved(weight_RC, hessian(), 2)
    assert found.quantized.outliers.weight_RK.dtype == dtype
    assert found.report.clipped_fraction == before
    level_RC = found.quantized.dequantize()
    assert torch.equal(level_RC[:, [7, 50]], found.quantized.outliers.weight_RK.float())


def test_expected_error_is_that_of_the_columns_that_are_rounded():
    # Of independent inputs nothing is made up for, and damping adds its 0.2 % to what is expected.
    report = solved(weight(256), torch.eye(96), 48, "W8A16", 96, 10**6, scale_search="absmax").report
    assert report.predicted_error == pytest.approx(report.relative_error, rel=0.02)


def test_without_tokens_the_first_columns_are_kept_as_they_are():
    weight_RC = weight(dtype=torch.bfloat16)
    found = solved(weight_RC, None, 3)
    assert found.report.fallback == RTN_NO_TOKENS
    assert found.quantized.outliers.column_K.tolist() == [0, 1, 2]
    assert torch.equal(found.quantized.outliers.weight_RK, weight_RC[:, :3])
    error_RC = weight_RC.float() - found.quantized.dequantize()
    assert found.report.relative_error == pytest.approx(
        (error_RC.square().sum() / weight_RC.float().square().sum()).item(), rel=1e-4
    )


def test_without_a_factor_the_strongest_columns_are_kept_as_they_are():
    weight_RC, hessian_CC = weight(dtype=torch.bfloat16), hessian()
    # No matrix of squares: no rung makes it positive.
    hessian_CC[0, 1] = hessian_CC[1, 0] = 1e6 * hessian_CC.diagonal().max()
    found = solved(weight_RC, hessian_CC, 2)
    assert found.report.fallback == RTN_NOT_FACTORED
    assert found.quantized.outliers.weight_RK.dtype == torch.bfloat16
    assert found.quantized.outliers.column_K.tolist() == [7, 50]
    assert torch.equal(found.quantized.outliers.weight_RK, weight_RC[:, [7, 50]])


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 9), min_size=2, max_size=3),
    rows=st.integers(1, 40),
    count=st.integers(1, 20),
    passes=st.integers(0, 1),
)
def test_a_batch_gives_each_of_its_linears_what_it_has_alone(seeds, rows, count, passes):
    scheme = scheme_from_name("W4A16", 32)
    solver = SolverSettings(outlier_columns=count, descent_passes=passes, refits_scales=bool(passes))
    prepared = [
        gptq.prepare(hessian_CC=hessian(seed=seed), cross_CC=None, num_tokens=TOKENS, solver=solver)
        for seed in seeds
    ]
    tiles = [{"w": weight(rows, seed=seed + 10).bfloat16()} for seed in seeds]
    together = gptq.solve_batch(prepared, tiles, scheme, scale_dtype=torch.bfloat16)
    for group, tile, found in zip(prepared, tiles, together, strict=True):
        alone = group.solve(tile, scheme, scale_dtype=torch.bfloat16)["w"].quantized
        mine = found["w"].quantized
        assert torch.equal(mine.codes_RC, alone.codes_RC)
        assert torch.equal(mine.outliers.column_K, alone.outliers.column_K)
        assert torch.equal(mine.outliers.weight_RK, alone.outliers.weight_RK)
