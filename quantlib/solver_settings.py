"""The choices that a solver leaves to the person: how scales are found, in which order, how often again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What follows from the extremes of a group alone.
FROM_EXTREMES = ("minmax", "absmax")
SCALE_SEARCHES = (*FROM_EXTREMES, "mse", "hessian", "inverse-hessian")
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
    """

    scale_search: str = "hessian"
    column_order: str = "activation"
    descent_passes: int = 0
    refits_scales: bool = False
    outlier_columns: int = 0

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "SolverSettings":
        """Of a job's options, by name."""
        return cls(
            scale_search=options["scale_search"],
            column_order=options["column_order"],
            descent_passes=options["descent_passes"],
            refits_scales=options["refit_scales"],
            outlier_columns=options["outlier_columns"],
        )


DEFAULT_SOLVER = SolverSettings()
