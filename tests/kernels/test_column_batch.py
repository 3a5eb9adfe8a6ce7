"""Columns of a batch on chip: bit for bit the plain loop, and codes of the way that torch's operations go."""

import pytest
import torch

from quantlib.grids.affine import AffineGrid
from quantlib.grids.levels import levels_of
from quantlib.kernels.column_batch import solve_columns
from quantlib.kernels.contracts import GroupScales, KeptEntries
from quantlib.linalg import factor_hessian
from quantlib.methods.column_solver import solve_codes_of_batch
from quantlib.methods.column_tile import Chosen
from quantlib.methods.kept_weights import Kept
from quantlib.schemes import CODEBOOK_NAMES, FLOAT_NAMES, INTEGER_NAMES, scheme_from_name
from tests.support.any_grid import any_grid
from tests.support.reference_solver import correlated_inputs


def linear(name: str, rows: int, columns: int, seed: int, device: torch.device):
    """Weight, grid and factor of a random linear."""
    x = torch.from_numpy(correlated_inputs(3 * columns, columns, seed)).float()
    weight_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.3
    scheme = scheme_from_name(name, 16 if name in INTEGER_NAMES else None)
    grid = any_grid(weight_RC, scheme, scale_dtype=torch.bfloat16, search="minmax")
    moved = AffineGrid(
        scheme=scheme,
        scale_RG=grid.scale_RG.to(device),
        zero_RG=None if grid.zero_RG is None else grid.zero_RG.to(device),
        is_bounded_RG=grid.is_bounded_RG.to(device),
    )
    factor = factor_hessian((x.T @ x).to(device), num_tokens=3 * columns)
    assert factor is not None
    return weight_RC.to(device), moved, factor


def assert_same(found: list[Chosen], expected: list[Chosen]) -> None:
    for its, other in zip(found, expected, strict=True):
        assert torch.equal(its.codes_RC, other.codes_RC)
        assert torch.equal(its.num_clipped_R, other.num_clipped_R)
        assert its.kept_RK.numel() == other.kept_RK.numel() == 0


@pytest.mark.parametrize("name", [*INTEGER_NAMES, *FLOAT_NAMES, *CODEBOOK_NAMES])
def test_codes_are_those_of_torch_for_every_format(name, device):
    weight_RC, grid, factor = linear(name, 32, 48, seed=1, device=device)
    found, expected = (
        solve_codes_of_batch([weight_RC], [grid], [factor], kernel=kernel) for kernel in (solve_columns, None)
    )
    assert_same(found, expected)
    assert len(expected[0].codes_RC.unique()) > 2


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 3), (40, 128), (33, 129), (1040, 24), (7, 260)])
@pytest.mark.parametrize("name", ["W4A16_ASYM", "NF4"])
def test_codes_are_those_of_torch_for_ragged_sizes(name, rows, columns, device):
    weight_RC, grid, factor = linear(name, rows, columns, seed=2, device=device)
    found, expected = (
        solve_codes_of_batch([weight_RC], [grid], [factor], kernel=kernel) for kernel in (solve_columns, None)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["W3A16", "W4A16_ASYM", "FP8A16"])
def test_each_of_a_batch_of_experts_has_the_codes_it_has_alone(name, device):
    experts = [linear(name, 48, 132, seed, device) for seed in range(3)]
    weights, grids, factors = (list(column) for column in zip(*experts, strict=True))
    together = solve_codes_of_batch(weights, grids, factors, kernel=solve_columns)
    alone = [
        solve_codes_of_batch(*([part] for part in expert), kernel=solve_columns)[0] for expert in experts
    ]
    assert_same(together, alone)
    assert_same(together, solve_codes_of_batch(weights, grids, factors, kernel=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("are_single", [False, True])
def test_what_is_kept_is_what_torch_keeps(dtype, are_single, device):
    experts = [linear("W3A16", 32, 140, seed, device) for seed in (3, 4)]
    weights, grids, factors = (list(column) for column in zip(*experts, strict=True))
    kept = Kept(num_columns=10, dtype=dtype)
    if are_single:
        drawn = torch.rand(2, 32, 140, generator=torch.Generator().manual_seed(5))
        chosen = list(drawn.argsort(2)[..., :9].sort(2).values.to(device))
        kept = Kept(weights=chosen, dtype=dtype)
    found, expected = (
        solve_codes_of_batch(weights, grids, factors, kept=kept, kernel=kernel)
        for kernel in (solve_columns, None)
    )
    for its, other in zip(found, expected, strict=True):
        assert torch.equal(its.codes_RC, other.codes_RC)
        assert torch.equal(its.num_clipped_R, other.num_clipped_R)
        # The errors that come together in what is kept are added up in another order.
        close = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        torch.testing.assert_close(its.kept_RK, other.kept_RK, rtol=close, atol=1e-6)
        assert torch.equal(its.kept_RK, its.kept_RK.to(dtype).float())


def plain_loop(target_BR, weight_BR, feedback_BB, scale_BR, lowest, highest, levels, kept=None):
    """Quotients, errors and offsets, one operation of torch after the other."""
    quotient_BR, error_BR = torch.empty_like(target_BR), torch.empty_like(target_BR)
    offset_BR, unsolved_BR = torch.empty_like(target_BR), target_BR.clone()
    for place in reversed(range(len(target_BR))):
        quotient_R = unsolved_BR[place] / scale_BR[place]
        offset_R = levels.nearest(quotient_R.clone(), lowest, highest, out=torch.empty_like(quotient_R))
        error_R = weight_BR[place] - offset_R * scale_BR[place]
        quotient_BR[place], offset_BR[place], error_BR[place] = quotient_R, offset_R, error_R
        for other in range(place):
            added_R = feedback_BB[place, other] * error_R
            unsolved_BR[other] = unsolved_BR[other] + added_R
    return quotient_BR, error_BR, offset_BR


@pytest.mark.parametrize("name", ["W2A16", "W8A16", "FP8A16", "MXFP4A16", "NF4", "FP4"])
def test_bits_are_those_of_the_plain_loop(name, device):
    """Ties, extremes and numbers far outside the grid among them."""
    batch, rows = 20, 70
    levels = levels_of(scheme_from_name(name, 16 if name in INTEGER_NAMES else None))
    made = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made).to(device)

    scale_GR = (normal(3, rows).abs() + 0.01).bfloat16().float()
    group_B = torch.arange(batch, device=device) % 3
    scale_BR = scale_GR[group_B]
    feedback_BB = normal(batch, batch) * 0.1
    # Nothing is fed back to the last positions: their quotients are just these.
    target_BR, weight_BR = normal(batch, rows) * levels.reach * scale_BR, normal(batch, rows)
    target_BR[-1] = torch.linspace(-2, 2, rows, device=device) * levels.reach * scale_BR[-1]
    target_BR[-2] = (torch.arange(rows, device=device) - rows // 2) * 0.25 * scale_BR[-2]
    feedback_BB[-2:, -2:] = 0.0
    lowest, highest = levels.bounds
    scales = GroupScales(scale_GR, torch.full_like(scale_GR, lowest), torch.full_like(scale_GR, highest))
    expected = plain_loop(target_BR, weight_BR, feedback_BB, scale_BR, lowest, highest, levels)
    found = target_BR[None].clone(), weight_BR[None].clone(), torch.empty_like(target_BR)[None]
    solve_columns(*found, feedback_BB[None], scales, group_B[None], levels)
    for its, other in zip(found, expected, strict=True):
        assert torch.equal(its[0], other)


def test_no_entry_but_those_kept_are_touched(device):
    rows, batch = 5, 4
    levels = levels_of(scheme_from_name("W4A16", 16))
    ones_GR = torch.ones(1, rows, device=device)
    scales = GroupScales(ones_GR, ones_GR * levels.bounds[0], ones_GR * levels.bounds[1])
    is_kept_EBR = torch.zeros(1, batch, rows, dtype=torch.bool, device=device)
    is_kept_EBR[0, 2, 3] = True
    kept = KeptEntries(is_kept_EBR, torch.full((1, batch, rows), -7.0, device=device), torch.bfloat16)
    target = torch.full((1, batch, rows), 1.00390625, device=device)
    feedback_EBB = torch.zeros(1, batch, batch, device=device)
    weight = target.clone()
    group_EB = torch.zeros(1, batch, dtype=torch.int64, device=device)
    offset = torch.empty_like(target)
    solve_columns(target, weight, offset, feedback_EBB, scales, group_EB, levels, kept)
    # Half a step of bf16 above 1: to the even neighbour.
    assert kept.value_EBR[is_kept_EBR].tolist() == [1.0]
    assert kept.value_EBR[~is_kept_EBR].eq(-7.0).all()
    assert weight[is_kept_EBR].tolist() == [0.00390625]
