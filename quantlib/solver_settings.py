"""The choices that a solver leaves to the person: how scales are found, in which order, how often again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What follows from the extremes of a group alone.
FROM_EXTREMES = ("minmax", "absmax")
SCALE_SEARCHES = (*FROM_EXTREMES, "mse", "hessian", "inverse-hessian")
# Of a thousand weights. Each costs 32 bits, so that 31 of a thousand cost as much as a bit more for all.
MOST_OUTLIER_WEIGHTS = 100
COLUMN_ORDERS = ("activation", "natural", "group-aware")


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverSettings:
    """How codes are chosen where a method leaves a choice; a method without data ignores what needs them.

    Attributes:
        scale_search: What a group's scale is searched for: ``minmax`` covers the extremes, of a symmetric
            group all but half a step of the positive one, ``absmax`` covers them whole; ``mse`` has the least
            squared error, ``hessian`` the least weighted by diag(H), ``inverse-hessian`` by
            1 / diag(H^-1), the cost of an error after the other columns have made up for it.
        column_order: In which order columns are solved: by falling diagonal of H (``activation``), as they
            stand (``natural``), or by falling diagonal inside groups and groups by their largest
            (``group-aware``).
        descent_passes: Passes of coordinate descent over all columns after the first solve.
        refits_scales: Whether scales are fitted to the codes by least squares before every such pass, or at
            the end without one.
        outlier_columns: How many columns of a linear are kept as they are beside the codes.
        outlier_weights: How many of a thousand weights of a row are.
        tf32_feedback: Whether a GPU may round to TF32 what errors are multiplied with on their way to columns
            solved later.
    """

    scale_search: str = "hessian"
    column_order: str = "activation"
    descent_passes: int = 0
    refits_scales: bool = False
    outlier_columns: int = 0
    outlier_weights: int = 0
    tf32_feedback: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "SolverSettings":
        """Of a job's options, by name."""
        return cls(
            scale_search=options["scale_search"],
            column_order=options["column_order"],
            descent_passes=options["descent_passes"],
            refits_scales=options["refit_scales"],
            outlier_columns=options["outlier_columns"],
            outlier_weights=options["outlier_weights"],
            tf32_feedback=options["tf32_feedback"],
        )


def weights_per_row(columns: int, per_mille: int) -> int:
    """How many single weights of each row are kept: the nearest whole number, at least one if any are.

    >>> [weights_per_row(columns, 5) for columns in (8, 576, 4096, 53248)], weights_per_row(4096, 0)
    ([1, 3, 20, 266], 0)
    """
    return max(1, (columns * per_mille + 500) // 1000) if per_mille else 0


DEFAULT_SOLVER = SolverSettings()
