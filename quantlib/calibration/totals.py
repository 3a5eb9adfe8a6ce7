"""Sums of cells' second moments that no order of cells or workers changes by a bit.

C columns (in features), P rows of a panel, L its columns. Partial sums in fp32 meet in int64 fixed
point, whose exponent the first cell decides: integer addition has no order, so any number of workers, any
assignment of cells and any repetition after a fault end in the same total. What is above the diagonal of a
symmetric total is nowhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from quantlib.calibration.fixed_point import LIMIT, TOTAL_BITS, add_fixed_point_, largest
from quantlib.calibration.hessian import mirror_
from quantlib.errors import NumericsError
from quantlib.panels import panel_shapes, panels_of

# By this many bits all cells together may exceed num_cells times the first one.
_HEADROOM_BITS = 10
# The same of an expert: it may be the first cell's least used one, and later the most used.
EXPERT_HEADROOM_BITS = 20
# A cell without any signal says nothing about the next; take 1 for its largest diagonal entry.
_DEFAULT_DIAGONAL = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """An exact sum over some cells, or over those of one worker.

    Attributes:
        panels: Rows of the sum, int64, from top to bottom: [P, C], or of a symmetric sum [P, end of the
            panel], so that it takes half the memory of the whole.
        exponent: An entry means its integer times 2**-exponent; the same for every cell of a sum.
        is_whole: Both triangles count: it is a sum of products of two streams, X_ref^T X.
    """

    panels: tuple[torch.Tensor, ...]
    exponent: int
    is_whole: bool = False

    @classmethod
    def zeros(
        cls,
        columns: int,
        exponent: int,
        *,
        is_whole: bool = False,
        device: torch.device | str = "cpu",
    ) -> "Total":
        """The sum over no cell.

        Args:
            exponent: From `exponent_for`.
        """
        shapes = panel_shapes(columns, is_whole=is_whole)
        panels = tuple(torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes)
        return cls(panels=panels, exponent=exponent, is_whole=is_whole)

    @property
    def columns(self) -> int:
        """Rows, and columns, of the sum."""
        return self.panels[-1].shape[1]

    def band(self, first: int, end: int) -> "BandSum":
        """Panels from ``first`` on and before ``end``, on the CPU."""
        panels = tuple(panel.cpu() for panel in self.panels[first:end])
        return BandSum(panels=panels, exponent=self.exponent, is_whole=self.is_whole)

    @classmethod
    def of(cls, bands: "Sequence[BandSum]") -> "Total":
        """The sum that was cut into these bands, in order."""
        panels = tuple(panel for band in bands for panel in band.panels)
        return cls(panels=panels, exponent=bands[0].exponent, is_whole=bands[0].is_whole)

    def add_(self, partials: Sequence[torch.Tensor]) -> None:
        """Add one cell's partial sum; after an error the total is half changed and of no use.

        Shapes:
            partials: fp32 [P, L], panels like its own.

        Raises:
            NumericsError: An entry of the partial sum is not finite, or the total leaves its range.

        Numerics: round(partial * 2**exponent), half to even, exact in fp64.

        Cost: as `add_fixed_point_`.
        """
        if add_cell_([(self, partials)]):
            self.refuse(partials)

    def add_noting_(self, partials: Sequence[torch.Tensor], refused: torch.Tensor) -> None:
        """Add one cell's partial sum without waiting for the device that it is on.

        Shapes:
            partials: fp32 [P, L], panels like its own.
            refused: int32 []; becomes 1 where `add_` would raise, and `refuse` then tells why.
        """
        for panel_PL, partial_PL in zip(self.panels, partials, strict=True):
            add_fixed_point_(panel_PL, partial_PL, self.exponent, refused)

    def refuse(self, partials: Sequence[torch.Tensor]) -> NoReturn:
        """Raise what `add_` would have raised of a partial sum that was refused."""
        for panel_PL, partial_PL in zip(self.panels, partials, strict=True):
            found = largest(partial_PL.double().mul_(2.0**self.exponent))
            if not math.isfinite(found):
                raise NumericsError(
                    "a cell's second moments must be finite, found NaN or infinity; look for the calibration"
                    " row whose activations are not finite"
                )
            _check_range(found if found >= LIMIT else largest(panel_PL), self.exponent)
        raise AssertionError("a sum that was refused holds nothing to refuse")


@dataclass(frozen=True, slots=True, kw_only=True)
class BandSum:
    """Neighbouring panels of a `Total`: what goes from worker to worker.

    Attributes:
        panels: As a total has them; perhaps mapped read-only.
        exponent: Of the total.
        is_whole: Of the total.
    """

    panels: tuple[torch.Tensor, ...]
    exponent: int
    is_whole: bool = False

    def largest(self) -> int:
        """Of all entries without their signs."""
        return max(int(largest(panel_PL)) for panel_PL in self.panels)

    def with_panels(self, panels: Sequence[torch.Tensor]) -> "BandSum":
        """Other numbers in the same place."""
        return BandSum(panels=tuple(panels), exponent=self.exponent, is_whole=self.is_whole)


def add_cell_(pairs: Sequence[tuple[Total, Sequence[torch.Tensor]]]) -> list[int]:
    """Add one cell's partial sums, and wait only once for the device that they are on.

    Args:
        pairs: Totals, and of each what `Total.add_` takes.

    Returns:
        Numbers of the pairs that `Total.add_` would have refused: `Total.refuse` tells why.
    """
    if not pairs:
        return []
    refused = torch.zeros(len(pairs), dtype=torch.int32, device=pairs[0][0].panels[0].device)
    for number, (total, panels) in enumerate(pairs):
        total.add_noting_(panels, refused[number])
    return [number for number, is_refused in enumerate(refused.tolist()) if is_refused]


def added(bands: Sequence[BandSum]) -> BandSum:
    """The same band of several totals of one exponent, added up in memory of its own.

    Raises:
        NumericsError: The sum leaves its range.
    """
    first = bands[0]
    stacks = zip(*(band.panels for band in bands), strict=True)
    return first.with_panels([_added(panels, first.exponent) for panels in stacks])


def exponent_for(max_diagonal: float, num_cells: int, headroom_bits: int = _HEADROOM_BITS) -> int:
    """How many bits below 1 the fixed-point total keeps.

    Args:
        max_diagonal: Largest diagonal entry of the first cell's partial sum; 0 where it saw only zeros.
        num_cells: Cells that will be summed, the first included.
        headroom_bits: By which all cells together may exceed ``num_cells`` times the first one.

    Raises:
        NumericsError: ``max_diagonal`` is negative or not finite.

    >>> exponent_for(1.0, 8), exponent_for(1000.0, 1), exponent_for(0.001, 1)
    (49, 42, 61)
    """
    if not (math.isfinite(max_diagonal) and max_diagonal >= 0):
        raise NumericsError(
            f"the first cell's largest second moment must be finite and not negative, found {max_diagonal};"
            " look for the calibration row whose activations are not finite"
        )
    diagonal_bits = math.ceil(math.log2(max_diagonal or _DEFAULT_DIAGONAL))
    return TOTAL_BITS - math.ceil(math.log2(num_cells)) - headroom_bits - diagonal_bits


def merged_panels(
    totals: Sequence[Total], device: torch.device | str = "cpu"
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The sum of several totals of one exponent, panel by panel.

    Shapes:
        Of a panel: int64 [P, C], or [P, end of the panel]; not to be changed.

    Yields:
        First row, row behind the last, and the panel on the device.

    Raises:
        NumericsError: The sum leaves its range.

    Cost: memory of two panels.
    """
    first = totals[0]
    for number, (start, end) in enumerate(panels_of(first.columns)):
        yield start, end, _added([total.panels[number] for total in totals], first.exponent, device)


def matrix_from(
    totals: Sequence[Total], *, columns: int | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """What several totals mean together.

    Args:
        totals: Of disjoint cells and one exponent; at least one.
        columns: As many of the first rows and columns; all by default.
        device: Where the matrix is made.

    Returns:
        fp32 [C, C]; of symmetric totals both triangles, equal bit for bit.

    Raises:
        NumericsError: The sum leaves its range.

    Cost: memory of three panels in 64 bits.
    """
    size = columns or totals[0].columns
    matrix_CC = torch.empty(size, size, dtype=torch.float32, device=device)
    for start, end, panel_PL in merged_panels(totals, device):
        kept_PL = panel_PL[: max(0, min(end, size) - start), :size]
        matrix_CC[start:end, : kept_PL.shape[1]] = kept_PL.double().mul_(2.0 ** -totals[0].exponent)
    if not totals[0].is_whole:
        mirror_(matrix_CC)
    return matrix_CC


def add_totals_(matrix_CC: torch.Tensor, totals: Sequence[Total], *, share: float) -> None:
    """Add a share of what several symmetric totals mean together to a matrix, fp32 [C, C].

    Raises:
        NumericsError: The sum leaves its range.

    Cost: memory of three panels in 64 bits.
    """
    assert len(matrix_CC) == totals[0].columns
    for start, end, panel_PL in merged_panels(totals, matrix_CC.device):
        added_PL = panel_PL.double().mul_(share * 2.0 ** -totals[0].exponent).float()
        left_Pl, corner_PP = added_PL[:, :start], added_PL[:, start:].tril()
        matrix_CC[start:end, :start] += left_Pl
        matrix_CC[:start, start:end] += left_Pl.T
        matrix_CC[start:end, start:end] += corner_PP + corner_PP.tril(-1).T


def _added(panels: Sequence[torch.Tensor], exponent: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The sum of panels, which stay as they are: they may be mapped read-only."""
    sum_PL = panels[0].to(device)
    for place, panel_PL in enumerate(panels[1:]):
        its_PL = panel_PL.to(device)
        sum_PL = sum_PL + its_PL if place == 0 else sum_PL.add_(its_PL)
        _check_range(largest(sum_PL), exponent)
    return sum_PL


def _check_range(found: float, exponent: int) -> None:
    if found >= LIMIT:
        raise NumericsError(
            f"the sum of second moments may reach {math.ldexp(LIMIT, -exponent):.3g}, found"
            f" {math.ldexp(found, -exponent):.3g}: later cells exceed the first more than"
            " a thousand times on average; look for calibration rows with outliers beyond measure",
            exponent=exponent,
        )
