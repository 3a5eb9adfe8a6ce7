"""Adding to a sum in fixed point on a GPU: all bits, and all refusals, of the way in torch on a CPU."""

import pytest
import torch

from quantlib.calibration.fixed_point import LIMIT
from quantlib.calibration.fixed_point import add_fixed_point_ as add_in_torch_
from quantlib.kernels import fixed_point

# The largest that an entry of a partial sum can be with an exponent of 0, and the next one.
LARGEST, BEYOND = 2.0**62 - 2.0**38, 2.0**62


def added(total_PL, partial_PL, exponent, device):
    """By the kernel and by torch: totals and whether they are refused."""
    results = []
    for add_, place in ((fixed_point.add_fixed_point_, device), (add_in_torch_, torch.device("cpu"))):
        sum_PL, refused = total_PL.to(place, copy=True), torch.zeros(2, dtype=torch.int32, device=place)
        add_(sum_PL, partial_PL.to(place), exponent, refused[0])
        assert refused[1] == 0
        results.append((sum_PL.cpu(), refused[0].item()))
    return results


def assert_same(total_PL, partial_PL, exponent, device):
    (found_PL, is_refused), (expected_PL, is_refused_in_torch) = added(total_PL, partial_PL, exponent, device)
    assert torch.equal(found_PL, expected_PL)
    assert not is_refused and not is_refused_in_torch
    return found_PL


def test_limit_is_that_of_totals():
    assert fixed_point._LIMIT.value == LIMIT


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (2, 1024), (5, 1025), (44, 300), (2, 3000)])
@pytest.mark.parametrize("exponent", [-60, -1, 0, 1, 16, 40])
def test_bits_are_those_of_torch_for_ragged_sizes(rows, columns, exponent, device):
    made = torch.Generator().manual_seed(rows + columns)
    partial_PL = torch.randn(rows, columns, generator=made) * 2.0 ** (30 - exponent)
    partial_PL *= torch.rand(rows, columns, generator=made) ** 12
    total_PL = torch.randint(-(2**61), 2**61, (rows, columns), generator=made)
    found_PL = assert_same(total_PL, partial_PL, exponent, device)
    assert not torch.equal(found_PL, total_PL)


def test_rows_of_a_partial_sum_may_be_apart(device):
    partial_PL = torch.randn(6, 512)[1:4, :300]
    assert_same(torch.zeros(3, 300, dtype=torch.int64), partial_PL, 30, device)


@pytest.mark.parametrize("exponent", [0, 12])
def test_halves_go_to_the_even_neighbour(exponent, device):
    halves_1L = (torch.arange(-40, 41, dtype=torch.float32)[None] / 2) * 2.0**-exponent
    found_1L = assert_same(torch.zeros(1, 81, dtype=torch.int64), halves_1L, exponent, device)
    assert found_1L[0, 40:46].tolist() == [0, 0, 1, 2, 2, 2]


def test_every_power_of_two_and_its_neighbours_are_as_in_torch(device):
    """Around the sizes from which on there are no fractions, in fp32 and in fp64."""
    powers_L = 2.0 ** torch.arange(-30, 62, dtype=torch.float32)
    up_L, down_L = (torch.nextafter(powers_L, torch.tensor(way)) for way in (float("inf"), 0.0))
    partial_PL = torch.stack([powers_L, up_L, down_L, -powers_L, -up_L, -down_L, powers_L * 1.5])
    assert_same(torch.zeros(partial_PL.shape, dtype=torch.int64), partial_PL, 0, device)


@pytest.mark.parametrize(("value", "exponent"), [(1e-45, 210), (1e-38, 180), (3e38, -70), (0.0, 211)])
def test_tiny_and_huge_numbers_keep_their_bits(value, exponent, device):
    """Powers of two that fp32 cannot hold, and numbers that are subnormal in it."""
    partial_PL = torch.tensor([[value, -value]])
    found_PL = assert_same(torch.zeros(1, 2, dtype=torch.int64), partial_PL, exponent, device)
    assert found_PL.any() == (value != 0)


def test_largest_that_fits_is_added(device):
    partial_PL = torch.tensor([[LARGEST, -LARGEST, 1.0]])
    found_PL = assert_same(torch.zeros(1, 3, dtype=torch.int64), partial_PL, 0, device)
    assert found_PL.tolist() == [[int(LARGEST), -int(LARGEST), 1]]
    total_PL = torch.tensor([[LIMIT - 2, 2 - LIMIT, 5]])
    assert_same(total_PL, torch.tensor([[1.0, -1.0, -5.0]]), 0, device)


@pytest.mark.parametrize("place", [(0, 0), (2, 1200), (1, 1023)])
@pytest.mark.parametrize(
    ("total", "value"),
    [(0, float("nan")), (0, float("inf")), (0, -float("inf")), (0, BEYOND), (0, -BEYOND)]
    + [(LIMIT - 2, 2.0), (2 - LIMIT, -2.0), (LIMIT - 1, LARGEST), (1 - LIMIT, -LARGEST)],
)
def test_what_does_not_fit_is_refused_wherever_it_is(total, value, place, device):
    total_PL, partial_PL = torch.zeros(3, 1201, dtype=torch.int64), torch.ones(3, 1201)
    total_PL[place], partial_PL[place] = total, value
    refusals = [is_refused for _, is_refused in added(total_PL, partial_PL, 0, device)]
    assert refusals == [1, 1]


def test_refusal_that_was_noted_before_stays(device):
    refused = torch.ones((), dtype=torch.int32, device=device)
    total_PL = torch.zeros(2, 3, dtype=torch.int64, device=device)
    fixed_point.add_fixed_point_(total_PL, torch.ones(2, 3, device=device), 0, refused)
    assert refused.item() == 1
