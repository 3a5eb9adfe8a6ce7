"""Scales fitted to codes by least squares, row by row.

R rows (out features), C columns (in features), G groups, S columns of a group. With the codes fixed, the loss
of a row is a quadratic form in its G scales: with o_g the offsets of group g (zero elsewhere), its matrix is
``o_g^T H o_h`` and its right side ``o_g^T H w``. The new scales are rounded to their stored dtype, and a row
keeps its old ones unless the new ones are better as stored.
"""

import torch
from torch.nn.functional import pad

from quantlib.grids.affine import AffineGrid, whole_vectors, with_codes
from quantlib.grids.stored_scale import round_to_stored
from quantlib.outliers import Outliers

# Rows at a time: bounds the matrices of G x G, which are held in fp64, and three buffers of C numbers a row.
# A GPU wants few large calls.
_TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# Relative to the mean of its diagonal: keeps a row's system solvable where groups say almost the same.
_RIDGE = 1e-6
# A scale that wants to leave this range of its old value sits in a system too ill-conditioned to be believed.
_LARGEST_CHANGE = 2.0


def refit_scales(
    weight_RC: torch.Tensor,
    codes_RC: torch.Tensor,
    grid: AffineGrid,
    hessian_CC: torch.Tensor,
    *,
    damping: float,
    outliers: Outliers | None = None,
) -> AffineGrid:
    """The grid with the scales that suit its codes best.

    Shapes:
        weight_RC: fp32 [R, C].
        codes_RC: uint8 [R, C].
        hessian_CC: [C, C] in the dtype of the weight, symmetric, not damped.

    Args:
        grid: The scales with which the codes were chosen.
        damping: Added to the diagonal of the Hessian.
        outliers: Columns or weights that do not mean their codes.

    Returns:
        A grid in the same stored dtype, with the same zero points; no row's damped loss is larger.

    Cost: R * C**2 multiply-adds, R * G**3 / 3 for the systems; memory of a tile of rows.
    """
    filled_rows = whole_vectors(len(weight_RC), weight_RC.device)
    if filled_rows is not None:
        filled = refit_scales(
            weight_RC[filled_rows],
            codes_RC[filled_rows],
            grid.rows(filled_rows),
            hessian_CC,
            damping=damping,
            outliers=outliers and outliers.rows(filled_rows),
        )
        return filled.rows(slice(len(weight_RC)))
    columns = weight_RC.shape[1]
    num_groups = grid.scheme.num_groups(columns)
    row_bytes = 8 * num_groups**2 + 3 * 4 * columns
    step = max(16, _TILE_BYTES[weight_RC.device.type] // row_bytes // 16 * 16)
    quantized = with_codes(grid, codes_RC)
    scale_RG = torch.empty_like(grid.scale_RG)
    for start in range(0, len(weight_RC), step):
        part = slice(start, start + step)
        offset_RC = quantized.rows(part).offsets(out=torch.empty_like(weight_RC[part]))
        target_RC = weight_RC[part]
        if outliers is not None:
            # No scale moves them: what they leave of their weights is left to all others.
            target_RC = outliers.rows(part).taken_from(target_RC)
            outliers.rows(part).erase_from_(offset_RC)
        system_RGG, wanted_RG = _normal_equations(target_RC, offset_RC, grid, hessian_CC, damping)
        scale_RG[part] = _better_scales(system_RGG, wanted_RG, grid, part)
    return AffineGrid(
        scheme=grid.scheme,
        scale_RG=scale_RG,
        zero_RG=grid.zero_RG,
        is_bounded_RG=grid.is_bounded_RG,
        divisor_R1=grid.divisor_R1,
    )


def _normal_equations(
    weight_RC: torch.Tensor,
    offset_RC: torch.Tensor,
    grid: AffineGrid,
    hessian_CC: torch.Tensor,
    damping: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 [R, G, G] and [R, G]: the quadratic form in the scales and its linear part."""
    rows, columns = weight_RC.shape
    width = grid.scheme.columns_per_group(columns)
    num_groups = grid.scheme.num_groups(columns)
    missing = num_groups * width - columns
    system_RGG = torch.empty(rows, num_groups, num_groups, dtype=torch.float64, device=weight_RC.device)
    wanted_RG = torch.empty(rows, num_groups, dtype=torch.float64, device=weight_RC.device)
    for group, start in enumerate(range(0, columns, width)):
        own = slice(start, min(start + width, columns))
        pulled_RC = offset_RC[:, own] @ hessian_CC[own]
        pulled_RC[:, own].add_(offset_RC[:, own], alpha=damping)
        wanted_RG[:, group] = torch.sum(pulled_RC * weight_RC, dim=1, dtype=torch.float64)
        along_RGS = pad(pulled_RC.mul_(offset_RC), (0, missing)).unflatten(1, (num_groups, width))
        system_RGG[:, group] = torch.sum(along_RGS, dim=2, dtype=torch.float64)
    return system_RGG, wanted_RG


def _better_scales(
    system_RGG: torch.Tensor, wanted_RG: torch.Tensor, grid: AffineGrid, part: slice
) -> torch.Tensor:
    """Rounded solutions where they are better than what is stored, in the stored dtype."""
    stored_RG = grid.scale_RG[part]
    divisor_R1 = None if grid.divisor_R1 is None else grid.divisor_R1[part]
    before_RG = stored_RG.double()
    diagonal_RG = system_RGG.diagonal(dim1=1, dim2=2)
    mean_R1 = diagonal_RG.mean(1, keepdim=True)
    # A group whose codes all mean zero has an empty row: its scale stays.
    added_RG = torch.where(diagonal_RG > 0, _RIDGE * mean_R1, 1.0)
    ridged_RGG = system_RGG + torch.diag_embed(added_RG)
    residual_RG = wanted_RG - (system_RGG @ before_RG[..., None])[..., 0]
    step_RG, status_R = torch.linalg.solve_ex(ridged_RGG, residual_RG)
    after_RG = before_RG + step_RG
    is_sane_RG = (after_RG < before_RG * _LARGEST_CHANGE) & (after_RG > before_RG / _LARGEST_CHANGE)
    wanted = torch.where(is_sane_RG, after_RG, before_RG).float()
    rounded_RG = round_to_stored(wanted, stored_RG.dtype, grid.scheme.scales, divisor_R1)
    gain_R = _loss(system_RGG, wanted_RG, before_RG) - _loss(system_RGG, wanted_RG, rounded_RG.double())
    is_better_R = (status_R == 0) & (gain_R > 0)
    return torch.where(is_better_R[:, None], rounded_RG.to(stored_RG.dtype), stored_RG)


def _loss(system_RGG: torch.Tensor, wanted_RG: torch.Tensor, scale_RG: torch.Tensor) -> torch.Tensor:
    """[R], up to a constant."""
    pulled_RG = (system_RGG @ scale_RG[..., None])[..., 0]
    return ((pulled_RG - 2.0 * wanted_RG) * scale_RG).sum(1)
