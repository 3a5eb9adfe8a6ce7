"""Second moments: precision, and sums that no order or split changes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.calibration.hessian import (
    add_partial_,
    add_total_,
    cross_from,
    cross_product,
    exponent_for,
    gram_lower,
    hessian_from,
)
from quantlib.errors import NumericsError
from tests.support.reference_solver import correlated_inputs


def cells(num_cells, num_tokens, columns, seed, dtype=torch.float32):
    x = torch.from_numpy(correlated_inputs(num_cells * num_tokens, columns, seed))
    return list(x.to(dtype).split(num_tokens))


def total_of(partials, exponent):
    total_CC = torch.zeros(partials[0].shape, dtype=torch.int64)
    for partial_CC in partials:
        add_partial_(total_CC, partial_CC, exponent)
    return total_CC


def exponent_of(partials):
    return exponent_for(partials[0].diagonal().max().item(), len(partials))


@pytest.mark.parametrize("tokens", [64, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 100, 128, 300, 2100])
def test_gram_lower_equals_float64_product(columns, dtype, tokens):
    x_NC = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = (x_NC.double().T @ x_NC.double()).tril()
    found = gram_lower(x_NC)
    assert found.dtype == torch.float32
    # A product rounded to 16 bits would be off by 4e-3 (bf16) or 5e-4 (fp16) of the largest entry; what is
    # allowed is that fp32 sums lose the last bit with every term.
    tolerance = tokens * 2.0**-24 * exact.max().item()
    torch.testing.assert_close(found.double().tril(), exact, rtol=0, atol=tolerance)
    whole = cross_product(x_NC.flip(1), x_NC)
    assert whole.dtype == torch.float32
    product = x_NC.double().flip(1).T @ x_NC.double()
    torch.testing.assert_close(whole.double(), product, rtol=0, atol=tolerance)


def test_gram_lower_input_with_strides_equals_contiguous_input():
    wide_NC = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    found = gram_lower(wide_NC[:, ::2])
    assert torch.equal(found.tril(), gram_lower(wide_NC[:, ::2].contiguous()).tril())


def test_gram_lower_skips_most_of_the_upper_triangle():
    found = gram_lower(torch.ones(4, 1024))
    assert (found.triu(128) == 0).all()


def test_hessian_of_ones_as_in_upstream_unit_test():
    partials = [gram_lower(torch.ones(6, 2)) for _ in range(3)]
    exponent = exponent_of(partials)
    assert torch.equal(hessian_from(total_of(partials, exponent), exponent), torch.full((2, 2), 18.0))


@pytest.mark.parametrize("columns", [40, 300])
def test_hessian_is_exact_to_fp32_and_symmetric(columns):
    parts = cells(7, 90, columns, seed=2)
    partials = [gram_lower(x) for x in parts]
    exponent = exponent_of(partials)
    found = hessian_from(total_of(partials, exponent), exponent)
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
    merged = torch.zeros_like(straight)
    for worker in range(num_workers):
        own = [partials[cell] for cell, by in zip(order, owner, strict=True) if by == worker]
        if own:
            add_total_(merged, total_of(own, exponent), exponent)
    assert torch.equal(merged.tril(), straight.tril())
    assert torch.equal(hessian_from(merged, exponent), hessian_from(straight, exponent))


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
        add_partial_(torch.zeros(200, 200, dtype=torch.int64), partial_CC, 30)


def test_partial_garbage_above_the_diagonal_is_not_read():
    partial_CC = gram_lower(torch.randn(10, 300, generator=torch.Generator().manual_seed(0)))
    spoiled_CC = partial_CC.clone()
    spoiled_CC[0, 299] = float("nan")
    exponent = exponent_of([partial_CC])
    found = hessian_from(total_of([spoiled_CC], exponent), exponent)
    assert torch.equal(found, hessian_from(total_of([partial_CC], exponent), exponent))


@pytest.mark.parametrize(
    ("growth", "is_refused"), [(1.0, False), (512.0, False), (3000.0, True), (1e30, True)]
)
def test_total_later_cells_beyond_the_headroom_raise(growth, is_refused):
    first_CC = gram_lower(torch.ones(4, 3))
    exponent = exponent_for(4.0, 8)
    total_CC = total_of([first_CC], exponent)
    if not is_refused:
        for _ in range(7):
            add_partial_(total_CC, first_CC * growth, exponent)
        return
    with pytest.raises(NumericsError, match="smaller exponent"):
        for _ in range(7):
            add_partial_(total_CC, first_CC * growth, exponent)


def test_totals_of_workers_beyond_the_headroom_raise():
    exponent = exponent_for(4.0, 8)
    half_CC = total_of([gram_lower(torch.ones(4, 3)) * 5000.0], exponent)
    with pytest.raises(NumericsError, match="smaller exponent"):
        for _ in range(3):
            add_total_(half_CC, half_CC.clone(), exponent)


def test_negative_products_round_like_positive_ones():
    partial_CC = torch.tensor([[1.0, 0.0], [-0.875, 1.0]])
    total_CC = total_of([partial_CC], 2)
    assert total_CC.tolist() == [[4, 0], [-4, 4]]
    assert np.array_equal(hessian_from(total_CC, 2).numpy(), [[1.0, -1.0], [-1.0, 1.0]])


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 200), seed=st.integers(0, 10**6), data=st.data())
def test_whole_total_any_order_gives_the_same_bits_and_the_float64_product(columns, seed, data):
    rng = np.random.default_rng(seed)
    pairs = [rng.normal(size=(2, 20, columns)) for _ in range(4)]
    partials = [cross_product(*(torch.from_numpy(side).float() for side in pair)) for pair in pairs]
    exponent = exponent_for(max(float(partial.abs().max()) for partial in partials), len(partials))
    totals = []
    for order in (range(4), data.draw(st.permutations(range(4)))):
        total_CC = torch.zeros(columns, columns, dtype=torch.int64)
        for number in order:
            add_partial_(total_CC, partials[number], exponent, is_whole=True)
        totals.append(total_CC)
    assert torch.equal(*totals)
    two_workers = torch.zeros_like(totals[0])
    add_partial_(two_workers, partials[0], exponent, is_whole=True)
    rest = torch.zeros_like(two_workers)
    for partial_CC in partials[1:]:
        add_partial_(rest, partial_CC, exponent, is_whole=True)
    add_total_(two_workers, rest, exponent, is_whole=True)
    assert torch.equal(two_workers, totals[0])
    wanted = sum(reference.T @ x for reference, x in pairs)
    np.testing.assert_allclose(cross_from(totals[0], exponent).numpy(), wanted, atol=2e-4)
