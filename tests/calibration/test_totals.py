"""Sums of cells: exact, and no order or split changes them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.calibration.totals import Total, add_cell_, exponent_for, matrix_from, merged_panels
from quantlib.errors import NumericsError
from tests.support.partials import cross_product, gram_lower, panels_from
from tests.support.reference_solver import correlated_inputs


def cells(num_cells, num_tokens, columns, seed, dtype=torch.float32):
    x = torch.from_numpy(correlated_inputs(num_cells * num_tokens, columns, seed))
    return list(x.to(dtype).split(num_tokens))


def total_of(partials, exponent, *, is_whole=False):
    total = Total.zeros(len(partials[0]), exponent, is_whole=is_whole)
    for partial_CC in partials:
        total.add_(panels_from(partial_CC, is_whole=is_whole))
    return total


def exponent_of(partials):
    return exponent_for(partials[0].diagonal().max().item(), len(partials))


def test_hessian_of_ones_as_in_upstream_unit_test():
    partials = [gram_lower(torch.ones(6, 2)) for _ in range(3)]
    exponent = exponent_of(partials)
    assert torch.equal(matrix_from([total_of(partials, exponent)]), torch.full((2, 2), 18.0))


@pytest.mark.parametrize("columns", [40, 300])
def test_hessian_is_exact_to_fp32_and_symmetric(columns):
    parts = cells(7, 90, columns, seed=2)
    partials = [gram_lower(x) for x in parts]
    exponent = exponent_of(partials)
    found = matrix_from([total_of(partials, exponent)])
    exact = sum(p.double().tril() for p in partials)
    exact = exact + exact.tril(-1).T
    assert torch.equal(found, found.T)
    # The sum itself loses nothing an fp32 result could hold: one rounding, 2**-24.
    torch.testing.assert_close(found.double(), exact, rtol=2**-24, atol=1e-13 * exact.max().item())
    truth = torch.cat(parts).double().T @ torch.cat(parts).double()
    assert (found.double() - truth).abs().max() < 1e-6 * truth.max()


@settings(max_examples=40, deadline=None)
@given(
    num_cells=st.integers(1, 9),
    columns=st.sampled_from([3, 17, 130]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_total_any_order_and_any_number_of_workers_gives_the_same_bits(num_cells, columns, seed, data):
    partials = [gram_lower(x) for x in cells(num_cells, 20, columns, seed)]
    exponent = exponent_of(partials)
    straight = total_of(partials, exponent)
    order = data.draw(st.permutations(range(num_cells)))
    num_workers = data.draw(st.integers(1, num_cells))
    owner = [data.draw(st.integers(0, num_workers - 1)) for _ in order]
    shared = []
    for worker in range(num_workers):
        own = [partials[cell] for cell, by in zip(order, owner, strict=True) if by == worker]
        if own:
            shared.append(total_of(own, exponent))
    for (_, _, found), wanted in zip(merged_panels(shared), straight.panels, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(matrix_from(shared), matrix_from([straight]))


def test_total_fp32_sums_would_depend_on_order():
    # The reason for fixed point: the same partials in another order differ in plain fp32.
    partials = [gram_lower(x) for x in cells(6, 20, 40, seed=0)]
    sums = {sum(p, torch.zeros(40, 40)).numpy().tobytes() for p in itertools.permutations(partials)}
    assert len(sums) > 1


@pytest.mark.parametrize(
    ("max_diagonal", "num_cells"), [(1.0, 1), (1.0001, 1), (0.75, 64), (3e9, 100), (1e-30, 5), (1e-44, 2)]
)
def test_exponent_keeps_headroom_and_precision(max_diagonal, num_cells):
    exponent = exponent_for(max_diagonal, num_cells)
    largest_total = max_diagonal * num_cells * 2.0**exponent
    # 2**10 of headroom below 2**62, and never more than 2 bits of it wasted on rounding up.
    assert 2.0**49 < largest_total <= 2.0**52


def test_exponent_first_cell_of_zeros_counts_as_one():
    assert exponent_for(0.0, 4) == exponent_for(1.0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_exponent_impossible_diagonal_raises(value):
    with pytest.raises(NumericsError):
        exponent_for(value, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_partial_not_finite_raises(value):
    partial_CC = torch.ones(200, 200)
    partial_CC[190, 3] = value
    with pytest.raises(NumericsError, match="finite"):
        Total.zeros(200, 30).add_(panels_from(partial_CC))


@pytest.mark.parametrize(
    ("growth", "is_refused"), [(1.0, False), (512.0, False), (3000.0, True), (1e30, True)]
)
def test_total_later_cells_beyond_the_headroom_raise(growth, is_refused):
    first_CC = gram_lower(torch.ones(4, 3))
    exponent = exponent_for(4.0, 8)
    total = total_of([first_CC], exponent)
    if not is_refused:
        for _ in range(7):
            total.add_(panels_from(first_CC * growth))
        return
    with pytest.raises(NumericsError, match="a thousand times"):
        for _ in range(7):
            total.add_(panels_from(first_CC * growth))


def test_totals_of_workers_beyond_the_headroom_raise():
    exponent = exponent_for(4.0, 8)
    half = total_of([gram_lower(torch.ones(4, 3)) * 5000.0], exponent)
    matrix_from([half])
    for number in (2, 8):  # eight of them would wrap around
        with pytest.raises(NumericsError, match="a thousand times"):
            matrix_from([half] * number)


def test_cell_is_added_to_all_totals_and_what_is_refused_is_told_apart():
    ones_CC = torch.ones(3, 3)
    pairs = [(Total.zeros(3, 0), [ones_CC * factor]) for factor in (1.0, torch.nan, 2.0**62, 5.0)]
    assert add_cell_(pairs) == [1, 2]
    assert [int(total.panels[0][1, 1]) for total, _ in pairs] == [1, 0, 0, 5]
    for number, said in ((1, "finite"), (2, "a thousand times")):
        total, panels = pairs[number]
        with pytest.raises(NumericsError, match=said):
            total.refuse(panels)
    assert add_cell_([]) == []


def test_negative_products_round_like_positive_ones():
    partial_CC = torch.tensor([[1.0, 0.0], [-0.875, 1.0]])
    total = total_of([partial_CC], 2)
    # -3.5 becomes -4: half to even.
    assert total.panels[0].tril().tolist() == [[4, 0], [-4, 4]]
    assert np.array_equal(matrix_from([total]).numpy(), [[1.0, -1.0], [-1.0, 1.0]])


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 200), seed=st.integers(0, 10**6), data=st.data())
def test_whole_total_any_order_gives_the_same_bits_and_the_float64_product(columns, seed, data):
    rng = np.random.default_rng(seed)
    pairs = [rng.normal(size=(2, 20, columns)) for _ in range(4)]
    partials = [cross_product(*(torch.from_numpy(side).float() for side in pair)) for pair in pairs]
    exponent = exponent_for(max(float(partial.abs().max()) for partial in partials), len(partials))
    totals = [
        total_of([partials[number] for number in order], exponent, is_whole=True)
        for order in (range(4), data.draw(st.permutations(range(4))))
    ]
    found = matrix_from(totals[:1])
    assert torch.equal(found, matrix_from(totals[1:]))
    two_workers = [total_of(part, exponent, is_whole=True) for part in (partials[:1], partials[1:])]
    assert torch.equal(found, matrix_from(two_workers))
    wanted = sum(reference.T @ x for reference, x in pairs)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-4)


@pytest.mark.parametrize("columns", [1, 128, 129, 700])
def test_total_of_a_symmetric_sum_holds_little_above_the_diagonal(columns):
    lower, whole = Total.zeros(columns, 0), Total.zeros(columns, 0, is_whole=True)
    assert lower.columns == whole.columns == columns
    assert sum(panel.numel() for panel in whole.panels) == columns**2
    assert sum(panel.numel() for panel in lower.panels) <= columns * (columns + 128) / 2 or columns <= 128


def test_matrix_of_the_first_columns_is_that_part_of_the_whole():
    partials = [gram_lower(x) for x in cells(3, 50, 300, seed=5)]
    total = total_of(partials, exponent_of(partials))
    for columns in (1, 128, 200, 256, 299):
        assert torch.equal(matrix_from([total], columns=columns), matrix_from([total])[:columns, :columns])
