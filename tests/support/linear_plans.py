"""Linears of plans that no checkpoint stands behind."""

from typing import Any

from quantlib.job.plan import LinearPlan
from quantlib.schemes import WeightScheme
from quantlib.strided_view import StoredPart


def linear_plan(
    name: str,
    rows: int,
    columns: int,
    scheme: WeightScheme,
    *,
    method: str = "gptq",
    corrects_bias: bool = False,
    **others: Any,
) -> LinearPlan:
    """A linear whose weight is stored as it is, under its own name."""
    return LinearPlan(
        name=name,
        path=name,
        rows=rows,
        columns=columns,
        method=method,
        scheme=scheme,
        corrects_bias=corrects_bias,
        weight=StoredPart(tensor=f"{name}.weight"),
        weight_dtype="F32",
        **others,
    )
