"""Single weights kept beside the codes: against elimination in float64, a choice written out, other tiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.methods import METHODS
from quantlib.methods.contracts import RTN_NO_TOKENS, RTN_NOT_FACTORED
from quantlib.schemes import scheme_from_name
from quantlib.solver_settings import SolverSettings, weights_per_row
from tests.support.reference_elimination import damped_hessian, solving_order
from tests.support.reference_solver import correlated_inputs

gptq = METHODS["gptq"]
TOKENS, COLUMNS, WIDTH = 500, 96, 32


def weight(rows=24, seed=0, dtype=torch.float32):
    """Normal, but for a few weights in every row that are several times as large."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, COLUMNS, generator=generator) * 0.05
    is_large_RC = torch.rand(rows, COLUMNS, generator=generator) < 0.02
    return torch.where(is_large_RC, 4 * weight_RC, weight_RC).to(dtype)


def hessian(seed=0, dtype=torch.float32):
    x = torch.from_numpy(correlated_inputs(TOKENS, COLUMNS, seed))
    x[:, [7, 50]] *= 30.0
    return (x.T @ x).to(dtype)


def solved(
    weight_RC, hessian_CC, per_mille, scheme="W4A16", tokens=TOKENS, scale_dtype=torch.bfloat16, **choices
):
    found = gptq(
        {"w": weight_RC},
        {"w": scheme_from_name(scheme, WIDTH)},
        hessian_CC=hessian_CC,
        num_tokens=tokens if hessian_CC is not None else 0,
        scale_dtype=scale_dtype,
        solver=SolverSettings(outlier_weights=per_mille, **choices),
    )
    return found["w"]


def by_elimination(weight, damped, scale, num_codes, order, kept):
    """Column by column in float64; a weight that is kept takes what it is by then, and leaves no error."""
    inverse, running = np.linalg.inv(damped), weight.astype(np.float64)
    codes, half = np.zeros(weight.shape, dtype=int), num_codes // 2
    levels = np.zeros(weight.shape)
    for column in order:
        step = scale[:, column // WIDTH]
        codes[:, column] = np.clip(np.rint(running[:, column] / step), -half, half - 1)
        levels[:, column] = np.where(kept[:, column], running[:, column], codes[:, column] * step)
        error = running[:, column] - levels[:, column]
        running -= np.outer(error / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, levels


def symmetric_scale(weight):
    """Of 4 bits, over the extremes of every group."""
    return 2 * np.abs(weight).reshape(len(weight), -1, WIDTH).max(2) / 15


def places(columns_RM):
    is_kept = np.zeros((len(columns_RM), COLUMNS), dtype=bool)
    np.put_along_axis(is_kept, columns_RM.numpy().astype(int), True, 1)
    return is_kept


@pytest.mark.parametrize("order", ["activation", "natural", "group-aware"])
def test_kept_weights_take_up_what_was_left_when_their_column_came(order):
    weight_RC, hessian_CC = weight(dtype=torch.float64), hessian(dtype=torch.float64)
    found = solved(weight_RC, hessian_CC, 30, column_order=order).quantized
    is_kept = places(found.outliers.column_RM)
    codes, levels = by_elimination(
        weight_RC.numpy(),
        damped_hessian(hessian_CC.numpy(), TOKENS),
        found.scale_RG.double().numpy(),
        16,
        solving_order(order, hessian_CC.numpy(), WIDTH),
        is_kept,
    )
    assert found.outliers.column_RM.shape == (24, 3)
    assert np.array_equal(found.codes_RC.numpy().astype(int) - 8, codes)
    kept = levels[is_kept].reshape(24, 3)
    np.testing.assert_allclose(found.outliers.weight_RM.numpy(), kept, rtol=1e-9, atol=1e-12)


def test_those_are_kept_whose_rounding_costs_most_where_scales_need_not_reach_them():
    weight_RC, hessian_CC = weight(dtype=torch.float64), hessian(dtype=torch.float64)
    choices = {"scale_search": "minmax", "scale_dtype": torch.float32}
    found = solved(weight_RC, hessian_CC, 30, **choices).quantized
    exact, cost = weight_RC.numpy(), 1 / np.linalg.inv(damped_hessian(hessian_CC.numpy(), TOKENS)).diagonal()
    chosen = []
    for row in exact:
        rest = row.copy()
        rest[np.argsort(-np.abs(row))[:3]] = 0.0
        step = np.repeat(symmetric_scale(rest[None])[0], WIDTH)
        level = np.clip(np.rint(row / step), -8, 7) * step
        chosen.append(sorted(np.argsort(-((row - level) ** 2) * cost)[:3]))
    assert found.outliers.column_RM.tolist() == chosen
    assert found.outliers.column_RM.dtype == torch.int32
    # By magnitude alone, or on scales that reach all, others would have been kept.
    assert chosen != [sorted(np.argsort(-np.abs(row))[:3]) for row in exact]
    rest = np.where(places(found.outliers.column_RM), 0.0, exact)
    np.testing.assert_allclose(found.scale_RG.numpy(), symmetric_scale(rest), rtol=1e-6)


def energy(x_RC, hessian_CC):
    return ((x_RC.double() @ hessian_CC.double()) * x_RC.double()).sum().item()


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W3A16", "W2A16_ASYM", "W8A16"])
def test_more_weights_kept_leave_less_error(scheme):
    weight_RC, hessian_CC = weight(64).bfloat16(), hessian()
    found = [solved(weight_RC, hessian_CC, per_mille, scheme) for per_mille in (0, 10, 30, 100)]
    errors = [linear.report.relative_error for linear in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]
    wanted = [
        energy(weight_RC - linear.quantized.dequantize(), hessian_CC) / energy(weight_RC, hessian_CC)
        for linear in found
    ]
    assert errors == pytest.approx(wanted, rel=1e-3)
    assert [linear.report.kept_weights for linear in found] == [0, 64, 3 * 64, 10 * 64]


def loss(weight_RC, found, hessian_CC):
    damped_CC = torch.from_numpy(damped_hessian(hessian_CC.double().numpy(), TOKENS))
    return energy(weight_RC - found.quantized.dequantize(), damped_CC)


def test_passes_and_refits_never_raise_the_loss():
    weight_RC, hessian_CC = weight(64), hessian()
    plain, refitted, passed, both = (
        loss(weight_RC, solved(weight_RC, hessian_CC, 30, "W3A16", **choices), hessian_CC)
        for choices in (
            {},
            {"refits_scales": True},
            {"descent_passes": 1},
            {"refits_scales": True, "descent_passes": 2},
        )
    )
    assert both < refitted < plain and both < passed < plain


def test_no_weight_that_is_kept_can_be_chosen_better_after_a_pass():
    """The last weight that a pass chooses is free: where it is kept, the loss has no slope there."""
    weight_RC, hessian_CC = weight(dtype=torch.float64), hessian(dtype=torch.float64)
    # In natural order column 95 is solved last; large there, it is kept in every row.
    weight_RC[:, 95] = 1.0
    found = solved(weight_RC, hessian_CC, 30, column_order="natural", descent_passes=1).quantized
    assert (found.outliers.column_RM[:, -1] == 95).all()
    level_RC = found.outliers.put_into_(
        ((found.codes_RC.double() - 8).view(24, -1, WIDTH) * found.scale_RG.double()[..., None]).flatten(1)
    )
    damped_CC = torch.from_numpy(damped_hessian(hessian_CC.numpy(), TOKENS))
    slope_R = ((weight_RC - level_RC) @ damped_CC)[:, 95]
    assert slope_R.abs().max() < 1e-10 * (weight_RC @ damped_CC).abs().max()


@pytest.mark.parametrize("search", ["minmax", "absmax", "mse", "hessian", "inverse-hessian"])
def test_scales_need_not_suit_kept_weights(search):
    weight_RC, hessian_CC = weight(), hessian()
    weight_RC[:, [11, 70]] = 1.0
    one, other = (
        solved(w_RC, hessian_CC, 21, scale_search=search).quantized
        for w_RC in (weight_RC, torch.where(weight_RC == 1.0, 100.0, weight_RC))
    )
    assert one.outliers.column_RM.tolist() == [[11, 70]] * 24 == other.outliers.column_RM.tolist()
    assert torch.equal(one.scale_RG, other.scale_RG)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_weights_are_in_the_dtype_of_the_weight_and_count_as_clipped_nowhere(dtype):
    weight_RC = weight()
    weight_RC[:, [11, 70]] = 100.0
    found = solved(weight_RC.to(dtype), hessian(), 21, scale_search="absmax", column_order="natural")
    assert found.quantized.outliers.weight_RM.dtype == dtype
    assert found.report.clipped_fraction < 0.02
    assert ((found.quantized.dequantize() - 100.0).abs() < 1.0).sum(1).tolist() == [2] * 24
    # Whoever reads the codes alone finds the largest level there.
    assert (found.quantized.codes_RC[:, [11, 70]] == 15).all()


def test_expected_error_is_that_of_the_weights_that_are_rounded():
    weight_RC = weight(256)
    found = solved(weight_RC, torch.eye(COLUMNS), 100, tokens=10**6)
    step_RC = found.quantized.scale_RG.double().repeat_interleave(WIDTH, 1).numpy()
    rounded = ~places(found.quantized.outliers.column_RM)
    # Of independent inputs nothing is made up for; damping adds its 0.2 % to what is expected.
    wanted = 1.002 * (step_RC[rounded] ** 2).sum() / 12 / weight_RC.double().square().sum().item()
    assert found.report.predicted_error == pytest.approx(wanted, rel=1e-4)


def test_without_tokens_the_largest_errors_are_kept_as_they_are():
    weight_RC = weight(dtype=torch.bfloat16)
    weight_RC[:, [11, 70]] = 1.0
    found = solved(weight_RC, None, 21)
    assert found.report.fallback == RTN_NO_TOKENS
    assert found.quantized.outliers.column_RM.tolist() == [[11, 70]] * 24
    assert torch.equal(found.quantized.outliers.weight_RM, weight_RC[:, [11, 70]])
    error_RC = weight_RC.float() - found.quantized.dequantize()
    assert found.report.relative_error == pytest.approx(
        (error_RC.square().sum() / weight_RC.float().square().sum()).item(), rel=1e-4
    )


def test_without_a_factor_weights_are_kept_as_they_are():
    weight_RC, hessian_CC = weight(dtype=torch.bfloat16), hessian()
    weight_RC[:, [11, 70]] = 1.0
    # No matrix of squares: no rung makes it positive.
    hessian_CC[0, 1] = hessian_CC[1, 0] = 1e6 * hessian_CC.diagonal().max()
    found = solved(weight_RC, hessian_CC, 50)
    assert found.report.fallback == RTN_NOT_FACTORED
    column_RM = found.quantized.outliers.column_RM.long()
    # By the diagonal errors of columns 7 and 50 count 900 times as much.
    assert {7, 50} < set(column_RM.flatten().tolist())
    assert torch.equal(found.quantized.outliers.weight_RM, weight_RC.gather(1, column_RM))


def test_rtn_keeps_none():
    solver = SolverSettings(outlier_weights=50)
    schemes = {"w": scheme_from_name("W4A16", WIDTH)}
    found = METHODS["rtn"]({"w": weight()}, schemes, scale_dtype=torch.bfloat16, solver=solver)["w"]
    assert found.quantized.outliers is None and found.report.kept_weights == 0


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 9), min_size=2, max_size=3),
    rows=st.integers(1, 40),
    per_mille=st.integers(1, 100),
    passes=st.integers(0, 1),
    data=st.data(),
)
def test_neither_a_batch_nor_other_rows_change_what_a_row_has(seeds, rows, per_mille, passes, data):
    scheme = scheme_from_name("W4A16", WIDTH)
    solver = SolverSettings(outlier_weights=per_mille, descent_passes=passes, refits_scales=bool(passes))
    prepared = [
        gptq.prepare(hessian_CC=hessian(seed), cross_CC=None, num_tokens=TOKENS, solver=solver)
        for seed in seeds
    ]
    tiles = [{"w": weight(rows, seed + 10).bfloat16()} for seed in seeds]
    together = gptq.solve_batch(prepared, tiles, scheme, scale_dtype=torch.bfloat16)
    start = data.draw(st.integers(0, rows - 1))
    part = slice(start, data.draw(st.integers(start + 1, rows)))
    for group, tile, found in zip(prepared, tiles, together, strict=True):
        alone = group.solve({"w": tile["w"][part]}, scheme, scale_dtype=torch.bfloat16)["w"].quantized
        mine = found["w"].quantized.rows(part)
        assert torch.equal(mine.codes_RC, alone.codes_RC)
        assert torch.equal(mine.outliers.column_RM, alone.outliers.column_RM)
        assert torch.equal(mine.outliers.weight_RM, alone.outliers.weight_RM)
        assert mine.outliers.column_RM.shape[1] == weights_per_row(COLUMNS, per_mille)
