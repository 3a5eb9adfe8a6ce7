"""What holds of the whole method at every width, symmetry, group size and order of columns.

Each test draws all of them. In float64 the method is held against elimination in numpy, which shares no code
with it; in the precision of a job it is held against itself under changes that must not matter.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantlib.calibration.totals import Total, exponent_for, matrix_from
from quantlib.column_order import natural_order
from quantlib.grids.affine import AffineGrid, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.linalg import factor_hessian
from quantlib.methods import METHODS, column_tile, target_correction
from quantlib.methods.column_solver import solve_codes
from quantlib.methods.coordinate_descent import descend
from quantlib.methods.target_correction import corrected_weight, target_change
from quantlib.packing import FORMATS
from quantlib.schemes import WHOLE_ROW, WeightScheme
from quantlib.solver_settings import COLUMN_ORDERS, SolverSettings
from tests.support.format_limits import FORMATS_AND_SCHEMES, scheme_for
from tests.support.partials import partial_of
from tests.support.reference_elimination import (
    damped_hessian,
    quadratic,
    scales_of_extremes,
    solve_by_elimination,
    solving_order,
    zeros_of_extremes,
)
from tests.support.reference_solver import correlated_inputs
from tests.support.solver_strategies import solvers

# With so many tokens the damping is at its floor.
MANY_TOKENS = 10**9

schemes = st.builds(
    WeightScheme,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    is_symmetric=st.booleans(),
    group_size=st.sampled_from([8, 16, WHOLE_ROW]),
)
orders = st.sampled_from(COLUMN_ORDERS)
seeds = st.integers(0, 10**6)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 60))


def problem(rows, columns, seed, dtype=torch.float32):
    """Weights that fp32 holds, and a Hessian with more tokens than columns."""
    x = correlated_inputs(3 * columns + 8, columns, seed)
    weight = np.random.default_rng(seed + 1).normal(size=(rows, columns)) * 0.3
    return torch.from_numpy(weight).float().to(dtype), torch.from_numpy(x.T @ x).to(dtype)


def run(
    weight_RC,
    hessian_CC,
    scheme,
    solver,
    *,
    method="gptq",
    num_tokens=MANY_TOKENS,
    cross_CC=None,
    height=None,
):
    return METHODS[method](
        {"w": weight_RC},
        {"w": scheme},
        hessian_CC=hessian_CC,
        cross_CC=cross_CC,
        num_tokens=num_tokens,
        scale_dtype=torch.bfloat16,
        solver=solver,
        height=height,
    )["w"]


def assert_same(found, wanted):
    """Codes, scales and zero points, bit for bit."""
    assert torch.equal(found.codes_RC, wanted.codes_RC)
    assert torch.equal(found.scale_RG, wanted.scale_RG)
    assert (found.zero_RG is None) == (wanted.zero_RG is None)
    assert wanted.zero_RG is None or torch.equal(found.zero_RG, wanted.zero_RG)


def stored_grid(quantized):
    """Scale and zero point [R, G] in numpy's float64."""
    zero_RG = quantized.zero_RG
    if zero_RG is None:
        zero_RG = torch.full(quantized.scale_RG.shape, quantized.scheme.middle_code)
    return quantized.scale_RG.double().numpy(), zero_RG.numpy().astype(int)


def kill(hessian_CC, dead):
    """Columns no token reached; the last one stays alive, else there is no Hessian."""
    dead = sorted(column for column in dead if column < len(hessian_CC) - 1)
    hessian_CC[dead], hessian_CC[:, dead] = 0, 0
    return dead


dead_columns = st.sets(st.integers(0, 59), max_size=4)


@settings(max_examples=100, deadline=None)
@given(sizes, schemes, orders, dead_columns, st.sampled_from([5, 200, MANY_TOKENS]), seeds)
def test_method_in_float64_equals_elimination(size, scheme, order, dead, num_tokens, seed):
    weight_RC, hessian_CC = problem(*size, seed, torch.float64)
    num_dead = len(kill(hessian_CC, dead))
    solver = SolverSettings(scale_search="minmax", column_order=order)
    found = run(weight_RC, hessian_CC, scheme, solver, num_tokens=num_tokens)
    w, h, width = weight_RC.numpy(), hessian_CC.numpy(), scheme.columns_per_group(size[1])
    damped = damped_hessian(h, num_tokens)
    scale, zero = stored_grid(found.quantized)
    # Half a unit in the last of the eight bits of a bf16.
    wanted_scale = scales_of_extremes(w, scheme.bits, scheme.is_symmetric, width)
    np.testing.assert_allclose(scale, wanted_scale, rtol=2**-8)
    assert np.array_equal(zero, zeros_of_extremes(w, scale, scheme.bits, scheme.is_symmetric, width))
    wanted = solve_by_elimination(
        w, damped, scale, zero, width=width, bits=scheme.bits, order=solving_order(order, h, width)
    )
    assert np.array_equal(found.quantized.codes_RC.numpy(), wanted.codes)
    error = w - found.quantized.dequantize().double().numpy()
    # What the columns cost one by one is what all cost together; the report leaves the damping out.
    np.testing.assert_allclose(quadratic(error, damped), wanted.loss, rtol=1e-7)
    energy, report = quadratic(w, h).sum(), found.report
    assert report.relative_error == pytest.approx(quadratic(error, h).sum() / energy, rel=1e-9)
    per_column = np.repeat(scale, width, axis=1)[:, : size[1]] ** 2 * wanted.pivots
    assert report.predicted_error == pytest.approx(per_column.sum() / 12 / energy, rel=1e-7)
    assert report.clipped_fraction == pytest.approx(wanted.clipped.sum() / w.size)
    added = (damped - h).diagonal().max()
    assert report.damping_fraction * h.diagonal().sum() / (size[1] - num_dead) == pytest.approx(added)
    assert (report.dead_columns, report.fallback) == (num_dead, None)


@settings(max_examples=50, deadline=None)
@given(sizes, schemes, orders, st.sampled_from(["minmax", "mse"]), st.integers(0, 2), st.booleans(), seeds)
def test_method_with_a_diagonal_hessian_is_rounding_to_nearest(
    size, scheme, order, search, passes, is_identity, seed
):
    weight_RC, _ = problem(*size, seed)
    diagonal_C = torch.rand(size[1], generator=torch.Generator().manual_seed(seed)) + 0.01
    hessian_CC = torch.eye(size[1]) * 3.7 if is_identity else torch.diag(diagonal_C)
    solver = SolverSettings(scale_search=search, column_order=order, descent_passes=passes)
    found = run(weight_RC, hessian_CC, scheme, solver, num_tokens=100)
    nearest = run(weight_RC, hessian_CC, scheme, solver, method="rtn")
    assert_same(found.quantized, nearest.quantized)
    assert found.report.relative_error == nearest.report.relative_error
    assert found.report.clipped_fraction == nearest.report.clipped_fraction


@settings(max_examples=50, deadline=None)
@given(sizes, schemes, solvers, st.integers(-60, 60), seeds)
def test_method_hessian_times_power_of_two_changes_no_bit(size, scheme, solver, power, seed):
    weight_RC, hessian_CC = problem(*size, seed)
    plain, scaled = (run(weight_RC, h, scheme, solver) for h in (hessian_CC, hessian_CC * 2.0**power))
    assert_same(scaled.quantized, plain.quantized)
    assert scaled.report.relative_error == plain.report.relative_error


@settings(max_examples=60, deadline=None)
@given(sizes, schemes, orders, st.integers(0, 1), st.floats(1e-9, 1e9), seeds)
def test_method_hessian_times_any_factor_changes_no_code_in_float64(
    size, scheme, order, passes, factor, seed
):
    weight_RC, hessian_CC = problem(*size, seed, torch.float64)
    solver = SolverSettings(scale_search="mse", column_order=order, descent_passes=passes)
    plain, scaled = (run(weight_RC, h, scheme, solver) for h in (hessian_CC, hessian_CC * factor))
    assert_same(scaled.quantized, plain.quantized)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), schemes, solvers, st.integers(1, 5), st.randoms(use_true_random=False), seeds)
def test_method_every_token_twice_in_any_order_changes_no_bit(
    columns, scheme, solver, num_cells, random, seed
):
    weight_RC, _ = problem(5, columns, seed)
    # Small integers, whose products and sums fp32 holds: only the normalization could tell the runs apart.
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randint(-9, 10, (20, columns), generator=generator).float() for _ in range(num_cells)]
    twice = cells * 2
    random.shuffle(twice)
    found = []
    for chosen in (cells, twice):
        exponent = exponent_for(partial_of(chosen[0]).peak, len(chosen))
        total = Total.zeros(columns, exponent)
        for x_NC in chosen:
            total.add_(partial_of(x_NC).panels)
        hessian_CC = matrix_from([total])
        found.append(run(weight_RC, hessian_CC, scheme, solver, num_tokens=100_000 * len(chosen)))
    assert_same(found[1].quantized, found[0].quantized)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), schemes, solvers, st.data())
def test_method_rows_depend_on_no_other_row_nor_on_their_place(rows, columns, scheme, solver, data):
    weight_RC, hessian_CC = problem(rows, columns, data.draw(seeds))
    whole = run(weight_RC, hessian_CC, scheme, solver, num_tokens=500).quantized
    rows_in = data.draw(st.permutations(range(rows)))
    chosen = rows_in[: data.draw(st.integers(1, rows))]
    part = run(weight_RC[chosen], hessian_CC, scheme, solver, num_tokens=500).quantized
    assert torch.equal(part.codes_RC, whole.codes_RC[chosen])
    assert torch.equal(part.scale_RG, whole.scale_RG[chosen])
    assert whole.zero_RG is None or torch.equal(part.zero_RG, whole.zero_RG[chosen])


@settings(max_examples=15, deadline=None)
@given(
    schemes,
    orders,
    st.integers(0, 1),
    st.tuples(st.integers(1, 90), st.integers(1, 40)),
    st.booleans(),
    seeds,
)
def test_method_tile_sizes_change_no_code_in_float64(scheme, order, passes, widths, has_short_tiles, seed):
    weight_RC, hessian_CC = problem(40, 150, seed, torch.float64)
    solver = SolverSettings(scale_search="minmax", column_order=order, descent_passes=passes)
    usual = run(weight_RC, hessian_CC, scheme, solver)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_tile, "BATCH_COLUMNS", max(widths))
        patch.setattr(column_tile, "LEAF_COLUMNS", min(widths))
        height = 16 if has_short_tiles else None
        assert_same(run(weight_RC, hessian_CC, scheme, solver, height=height).quantized, usual.quantized)


def moved_columns(num_groups, width, seed):
    """A permutation of columns that keeps groups together but moves them, and columns inside them."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        np.concatenate([group * width + rng.permutation(width) for group in rng.permutation(num_groups)])
    )


def moved_grid(grid_RG, moved_C, width):
    return None if grid_RG is None else grid_RG[:, moved_C[::width] // width]


@settings(max_examples=60, deadline=None)
@given(schemes, st.sampled_from(["activation", "group-aware"]), st.integers(1, 6), st.integers(0, 1), seeds)
def test_method_permuted_columns_give_permuted_codes(scheme, order, num_groups, passes, seed):
    width = 12 if scheme.group_size == WHOLE_ROW else scheme.group_size
    num_groups = 1 if scheme.group_size == WHOLE_ROW else num_groups
    weight_RC, hessian_CC = problem(6, num_groups * width, seed, torch.float64)
    moved_C = moved_columns(num_groups, width, seed)
    solver = SolverSettings(scale_search="minmax", column_order=order, descent_passes=passes)
    plain = run(weight_RC, hessian_CC, scheme, solver).quantized
    found = run(weight_RC[:, moved_C], hessian_CC[moved_C][:, moved_C], scheme, solver).quantized
    assert torch.equal(found.codes_RC, plain.codes_RC[:, moved_C])
    assert torch.equal(found.scale_RG, moved_grid(plain.scale_RG, moved_C, width))


@settings(max_examples=40, deadline=None)
@given(schemes, st.integers(1, 6), seeds)
def test_solver_permuted_columns_in_the_inverse_order_give_permuted_codes(scheme, num_groups, seed):
    width = 12 if scheme.group_size == WHOLE_ROW else scheme.group_size
    num_groups = 1 if scheme.group_size == WHOLE_ROW else num_groups
    columns = num_groups * width
    weight_RC, hessian_CC = problem(6, columns, seed, torch.float64)
    moved_C = moved_columns(num_groups, width, seed)
    natural_C = natural_order(columns)
    grid = fit_to_extremes(weight_RC.float(), scheme, scale_dtype=torch.bfloat16)
    factor = factor_hessian(hessian_CC, num_tokens=MANY_TOKENS, order_C=natural_C)
    plain_RC, _ = solve_codes(weight_RC, grid, factor)
    same_order_C = moved_C.argsort()[natural_C]
    moved = AffineGrid(
        scheme=scheme,
        scale_RG=moved_grid(grid.scale_RG, moved_C, width),
        zero_RG=moved_grid(grid.zero_RG, moved_C, width),
        is_bounded_RG=moved_grid(grid.is_bounded_RG, moved_C, width),
    )
    factor = factor_hessian(hessian_CC[moved_C][:, moved_C], num_tokens=MANY_TOKENS, order_C=same_order_C)
    assert torch.equal(solve_codes(weight_RC[:, moved_C], moved, factor)[0], plain_RC[:, moved_C])


@settings(max_examples=40, deadline=None)
@given(sizes, schemes, solvers, seeds)
def test_method_undisturbed_inputs_correct_nothing(size, scheme, solver, seed):
    weight_RC, hessian_CC = problem(*size, seed)
    assert torch.equal(corrected_weight(weight_RC, target_change(hessian_CC, hessian_CC)), weight_RC)
    plain, corrected = (run(weight_RC, hessian_CC, scheme, solver, cross_CC=c) for c in (None, hessian_CC))
    assert_same(corrected.quantized, plain.quantized)


@pytest.mark.parametrize(("damping", "shares"), [(1.0, (1e-3, 1.0)), (1e4, (1e-8, 1e-3)), (1e9, (0.0, 1e-8))])
def test_correction_fades_as_its_damping_grows(damping, shares, monkeypatch):
    monkeypatch.setattr(target_correction, "_DAMPING", damping)
    weight_RC, hessian_CC = problem(8, 40, seed=3)
    disturbed_CC = hessian_CC + 0.3 * problem(8, 40, seed=4)[1]
    change_RC = corrected_weight(weight_RC, target_change(hessian_CC, disturbed_CC)) - weight_RC
    assert shares[0] <= change_RC.norm() / weight_RC.norm() < shares[1]


@pytest.mark.parametrize(("format_name", "name"), FORMATS_AND_SCHEMES)
@pytest.mark.parametrize("order", COLUMN_ORDERS)
def test_method_levels_survive_packing_and_a_file(format_name, name, order, tmp_path):
    weight_RC, hessian_CC = problem(32, 96, seed=5)
    packer, scheme = FORMATS[format_name], scheme_for(format_name, name, 32)
    found = METHODS["gptq"](
        {"w": weight_RC},
        {"w": scheme},
        hessian_CC=hessian_CC,
        num_tokens=300,
        scale_dtype=packer.scale_dtype(torch.bfloat16),
        solver=SolverSettings(column_order=order, descent_passes=1, refits_scales=True),
    )["w"]
    save_file(packer.pack("w", found.quantized), tmp_path / "w.safetensors")
    read = packer.unpack("w", load_file(tmp_path / "w.safetensors"), scheme)
    assert torch.equal(read.dequantize(), found.quantized.dequantize())
    # The error that was reported is the one that a reader of the file has.
    w, h = weight_RC.double().numpy(), hessian_CC.double().numpy()
    error = w - read.dequantize().double().numpy()
    wanted = quadratic(error, h).sum() / quadratic(w, h).sum()
    assert found.report.relative_error == pytest.approx(wanted, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(5, 60)), schemes, solvers, dead_columns, seeds)
def test_method_dead_columns_are_rounded_to_nearest_and_all_is_finite(size, scheme, solver, dead, seed):
    # Scales fitted after the last choice of codes are not those that the codes were chosen on.
    assume(solver.descent_passes or not solver.refits_scales)
    weight_RC, hessian_CC = problem(*size, seed)
    dead = kill(hessian_CC, dead | {0})
    found = run(weight_RC, hessian_CC, scheme, solver, num_tokens=500)
    scale, zero = stored_grid(found.quantized)
    spread = np.array(dead) // scheme.columns_per_group(size[1])
    quotient = weight_RC.numpy()[:, dead] / scale[:, spread].astype(np.float32)
    wanted = np.clip(np.rint(quotient) + zero[:, spread], 0, scheme.num_codes - 1)
    assert np.array_equal(found.quantized.codes_RC[:, dead].numpy(), wanted)
    assert torch.isfinite(found.quantized.dequantize()).all()
    assert np.isfinite(found.report.relative_error)
    assert found.report.dead_columns == len(dead)


@settings(max_examples=60, deadline=None)
@given(sizes, schemes, orders, st.sampled_from([torch.bfloat16, torch.float16]), seeds)
def test_solver_levels_of_a_grid_are_a_fixed_point(size, scheme, order, scale_dtype, seed):
    weight_RC, hessian_CC = problem(*size, seed)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=scale_dtype)
    order_C = torch.tensor(solving_order(order, hessian_CC.numpy(), scheme.columns_per_group(size[1]))).flip(
        0
    )
    factor = factor_hessian(hessian_CC, num_tokens=500, order_C=order_C)
    codes_RC, _ = solve_codes(weight_RC, grid, factor)
    levels = with_codes(grid, codes_RC).dequantize()
    again_RC, num_clipped_R = solve_codes(levels, grid, factor)
    assert torch.equal(again_RC, codes_RC)
    assert not num_clipped_R.any()
    same_RC, _ = descend(levels, codes_RC, grid, hessian_CC, damping=factor.damping, order_C=order_C)
    assert torch.equal(same_RC, codes_RC)


@settings(max_examples=30, deadline=None)
@given(sizes, schemes, solvers, st.booleans(), seeds)
def test_method_without_a_token_is_rounding_to_nearest(size, scheme, solver, has_hessian, seed):
    weight_RC, _ = problem(*size, seed)
    empty_CC = torch.zeros(size[1], size[1]) if has_hessian else None
    found = run(weight_RC, empty_CC, scheme, solver, num_tokens=0)
    assert_same(found.quantized, run(weight_RC, None, scheme, solver, method="rtn").quantized)
    assert (found.report.method, found.report.fallback) == ("gptq", "rtn_no_tokens")
