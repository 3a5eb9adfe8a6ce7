"""The factor of error feedback: against numpy, the published vector, and every rung of the ladder."""

import numpy as np
import pytest
import torch

from quantlib.column_order import group_aware_order, natural_order
from quantlib.errors import NumericsError
from quantlib.linalg import damping_fraction_for, factor_hessian, inverse_diagonal
from tests.support.reference_solver import correlated_inputs, solve_reference

MANY_TOKENS = 10**9


def hessian(columns, *, num_tokens=None, seed=0, dtype=torch.float64):
    x = correlated_inputs(num_tokens or 4 * columns, columns, seed)
    return torch.from_numpy(x.T @ x).to(dtype)


def reversed_factor(factor):
    """R, upper triangular, columns in the order in which they are solved."""
    return (factor.feedback_CC * factor.pivots_C).flip(0, 1)


def solve_order(factor):
    return factor.order_C.flip(0)


def test_factor_times_its_transpose_is_the_damped_hessian():
    h = hessian(70)
    factor = factor_hessian(h, num_tokens=MANY_TOKENS)
    order, r = solve_order(factor), reversed_factor(factor)
    damped = h[order][:, order] + 0.002 * h.diagonal().mean() * torch.eye(70, dtype=torch.float64)
    torch.testing.assert_close(r @ r.T, damped, rtol=1e-12, atol=1e-9)
    assert torch.equal(r, r.triu())
    assert (factor.damping_fraction, factor.num_attempts, factor.rung) == (0.002, 1, "damped")


def test_factor_published_vector():
    h = torch.tensor([[4, 2, 0, 1], [2, 3, 1, 0], [0, 1, 2, 0.5], [1, 0, 0.5, 1]], dtype=torch.float64)
    added = 0.002 * h.diagonal().mean() / 1.002
    factor = factor_hessian(h - added * torch.eye(4), num_tokens=MANY_TOKENS)
    assert solve_order(factor).tolist() == [0, 1, 2, 3]
    wanted = torch.tensor([0.840168, 1.558387, 1.322876, 1.0], dtype=torch.float64)
    torch.testing.assert_close(factor.pivots_C.flip(0), wanted, atol=1e-6, rtol=0)
    inverse_row = torch.linalg.inv(reversed_factor(factor))[0]
    wanted = torch.tensor([1.190238, -1.120224, 0.980196, -1.680336], dtype=torch.float64)
    torch.testing.assert_close(inverse_row, wanted, atol=1e-6, rtol=0)


def test_factor_is_the_inverse_of_the_reference_factor():
    h = hessian(50, seed=3)
    factor = factor_hessian(h, num_tokens=MANY_TOKENS)
    reference = solve_reference(
        np.zeros((1, 50)),
        h.numpy(),
        np.ones((1, 1)),
        np.zeros((1, 1)),
        group_width=50,
        num_codes=16,
        damping=0.002 * h.diagonal().mean().item(),
    )
    product = reference.upper @ reversed_factor(factor).numpy()
    np.testing.assert_allclose(product, np.eye(50), atol=1e-10)
    assert solve_order(factor).tolist() == reference.order.tolist()


def test_factor_leaves_the_hessian_alone():
    h = hessian(40, dtype=torch.float32)
    before = h.clone()
    factor_hessian(h, num_tokens=100)
    assert torch.equal(h, before)


def test_factor_fp32_error_is_small():
    h = hessian(300)
    exact, single = (factor_hessian(h.to(d), num_tokens=MANY_TOKENS) for d in (torch.float64, torch.float32))
    assert single.feedback_CC.dtype == torch.float32
    # Measured 2e-6 relative to the largest entry; a wrong order or damping gives 1e-2 and more.
    difference = (reversed_factor(exact) - reversed_factor(single).double()).abs().max()
    assert difference / exact.pivots_C.max() < 2e-5


def test_order_equal_diagonals_lowest_column_first():
    h = torch.diag(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0, 1.0]))
    assert solve_order(factor_hessian(h, num_tokens=6)).tolist() == [1, 3, 4, 0, 2, 5]


@pytest.mark.parametrize("power", [-60, -3, 1, 7, 50])
def test_factor_hessian_times_power_of_two_changes_no_feedback_bit(power):
    h = hessian(90, dtype=torch.float32)
    plain, scaled = (factor_hessian(x, num_tokens=400) for x in (h, h * 2.0**power))
    assert torch.equal(plain.feedback_CC, scaled.feedback_CC)


def test_damping_rule():
    assert damping_fraction_for(256, 64) == 0.4
    assert damping_fraction_for(256, 1) == 0.5
    assert damping_fraction_for(256, 0) == 0.5
    assert damping_fraction_for(256, 25600) == 0.002
    assert damping_fraction_for(53248, 256 * 2048) == pytest.approx(0.010156, rel=1e-3)


def test_dead_columns_do_not_dilute_the_damping_and_are_cut_loose():
    h = hessian(30, seed=1)
    dead = [0, 7, 29]
    h[dead], h[:, dead] = 0, 0
    live = [c for c in range(30) if c not in dead]
    factor = factor_hessian(h, num_tokens=MANY_TOKENS)
    alone = factor_hessian(h[live][:, live], num_tokens=MANY_TOKENS)
    assert factor.num_dead_columns == 3
    assert solve_order(factor)[-3:].tolist() == dead
    torch.testing.assert_close(factor.pivots_C[3:], alone.pivots_C, rtol=1e-12, atol=0)
    assert torch.equal(factor.feedback_CC[:3, :3], torch.eye(3, dtype=torch.float64))
    assert (factor.feedback_CC[3:, :3] == 0).all()


def test_dead_column_with_remnants_off_its_diagonal_is_cut_loose():
    h = hessian(10)
    h[4, 4] = 0.0
    factor = factor_hessian(h, num_tokens=MANY_TOKENS)
    assert factor.rung == "damped"
    assert (factor.feedback_CC[1:, 0] == 0).all()


def with_lowest_eigenvalue(lowest, columns, seed):
    """Unit diagonal, symmetric, given lowest eigenvalue."""
    rng = np.random.default_rng(seed)
    off = rng.normal(size=(columns, columns))
    off = off + off.T
    np.fill_diagonal(off, 0.0)
    off *= (lowest - 1.0) / np.linalg.eigvalsh(off)[0]
    return torch.from_numpy(off + np.eye(columns)).float()


@pytest.mark.parametrize(
    ("lowest", "rung", "fraction", "num_attempts"),
    [
        (0.001, "damped", 0.002, 1),
        (-0.004, "more_damping", 0.008, 2),
        (-0.02, "more_damping", 0.032, 3),
        (-0.4, "more_damping", 0.5, 5),
        (-0.55, "shrinkage", 0.5, 7),
        (-1.5, "shrinkage", 0.5, 8),
    ],
)
def test_ladder_indefinite_hessian_takes_the_first_rung_that_holds(lowest, rung, fraction, num_attempts):
    factor = factor_hessian(with_lowest_eigenvalue(lowest, 40, seed=0), num_tokens=MANY_TOKENS)
    # 40 columns: the damping grows 0.002, 0.008, 0.032, 0.128, 0.5; then fp64; then shrinkage.
    assert (factor.rung, factor.damping_fraction) == (rung, pytest.approx(fraction))
    assert factor.num_attempts == num_attempts
    assert torch.isfinite(factor.feedback_CC).all()


def test_ladder_attempts_do_not_add_up_damping():
    h = with_lowest_eigenvalue(-0.02, 40, seed=0).double()
    factor = factor_hessian(h, num_tokens=MANY_TOKENS)
    r, order = reversed_factor(factor), solve_order(factor)
    damped = h[order][:, order] + 0.032 * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(r @ r.T, damped, rtol=0, atol=1e-12)


def test_ladder_float64_rescues_what_fp32_rounding_spoils():
    # A hundred pairs of columns; damped by half the mean they are positive definite by a part in 1e7 or less.
    diagonal = np.random.default_rng(0).uniform(0.5, 1.5, size=200).astype(np.float32)
    damped = diagonal.astype(np.float64) + 0.5 * diagonal.astype(np.float64).mean()
    h = np.diag(diagonal)
    for first in range(0, 200, 2):
        between = np.nextafter(np.float32(np.sqrt(damped[first] * damped[first + 1])), np.float32(0))
        h[first, first + 1] = h[first + 1, first] = between
    factor = factor_hessian(torch.from_numpy(h), num_tokens=1)
    assert (factor.rung, factor.damping_fraction, factor.num_attempts) == ("float64_factor", 0.5, 2)
    assert factor.feedback_CC.dtype == torch.float32 and torch.isfinite(factor.feedback_CC).all()


def test_ladder_hopeless_matrix_gives_none():
    h = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    assert factor_hessian(h, num_tokens=100) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_hessian_not_finite_raises(value):
    h = hessian(10, dtype=torch.float32)
    h[3, 5] = value
    with pytest.raises(NumericsError, match="finite"):
        factor_hessian(h, num_tokens=100)


@pytest.mark.parametrize("diagonal", [[1.0, -1.0], [0.0, 0.0]])
def test_hessian_that_is_no_sum_of_squares_raises(diagonal):
    with pytest.raises(NumericsError, match="sum of squares"):
        factor_hessian(torch.diag(torch.tensor(diagonal)), num_tokens=100)


@pytest.mark.parametrize("columns", [1, 70, 300])
def test_inverse_diagonal_is_that_of_the_inverse(columns):
    h = hessian(columns, seed=4)
    factor = factor_hessian(h, num_tokens=MANY_TOKENS)
    wanted = np.linalg.inv(h.numpy() + factor.damping * np.eye(columns)).diagonal()
    np.testing.assert_allclose(inverse_diagonal(factor).numpy(), wanted, rtol=1e-8)


@pytest.mark.parametrize("order", [natural_order(70), group_aware_order(hessian(70).diagonal(), 16)])
def test_factor_of_another_order_is_a_factor_of_the_same_matrix(order):
    h = hessian(70)
    factor = factor_hessian(h, num_tokens=MANY_TOKENS, order_C=order)
    assert torch.equal(factor.order_C, order)
    r, solved = reversed_factor(factor), solve_order(factor)
    damped = h + factor.damping * torch.eye(70, dtype=torch.float64)
    torch.testing.assert_close(r @ r.T, damped[solved][:, solved], rtol=1e-12, atol=1e-9)
    assert torch.equal(r, r.triu())


@pytest.mark.parametrize("order", [None, natural_order(70), group_aware_order(hessian(70).diagonal(), 16)])
def test_factor_of_any_order_undoes_the_upper_factor_of_the_inverse(order):
    h = hessian(70)
    factor = factor_hessian(h, num_tokens=MANY_TOKENS, order_C=order)
    solved = solve_order(factor).numpy()
    damped = h.numpy()[np.ix_(solved, solved)] + 0.002 * h.diagonal().mean().item() * np.eye(70)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(upper @ reversed_factor(factor).numpy(), np.eye(70), atol=1e-10)


@pytest.mark.parametrize("width", [1, 7, 16, 200])
def test_group_aware_order_sorts_inside_groups_and_groups_by_their_largest(width):
    diagonal = torch.randint(0, 9, (100,), generator=torch.Generator().manual_seed(0)).double()
    groups = [list(range(start, min(start + width, 100))) for start in range(0, 100, width)]
    groups.sort(key=lambda group: (-max(diagonal[c].item() for c in group), group[0]))
    wanted = [c for group in groups for c in sorted(group, key=lambda c: (-diagonal[c].item(), c))]
    assert group_aware_order(diagonal, width).flip(0).tolist() == wanted
