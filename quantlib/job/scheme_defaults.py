"""Choices of the solver that follow from the bits asked for, where nobody made them.

Below 4 bits descent and refit gain many times what they gain at 4 bits. At 3 bits the quantized blocks
disturb the activations enough for corrected targets to be worth a second stream, and scales weighted by the
inverse of the Hessian are better. A choice is a default where rows of ``tests/benchmarks/variants.md`` show
what it is worth. Scales that follow from a whole weight leave nothing to search or to refit.
"""

from collections.abc import Mapping
from typing import Any

_PLAIN: dict[str, Any] = {
    "propagation": "original",
    "correct_targets": False,
    "descent_passes": 0,
    "refit_scales": False,
    "scale_search": "hessian",
}
_POLISHED = {**_PLAIN, "descent_passes": 2, "refit_scales": True}
_CORRECTED = {
    **_POLISHED,
    "propagation": "quantized",
    "correct_targets": True,
    "scale_search": "inverse-hessian",
}
_BY_BITS = {2: _POLISHED, 3: _CORRECTED, 4: _PLAIN, 5: _PLAIN, 6: _PLAIN, 8: _PLAIN}
_GIVEN = {"scale_search": "minmax", "refit_scales": False}
FOLLOWING = tuple(_PLAIN)


def with_scheme_defaults(
    choices: Mapping[str, Any], *, bits: int, uses_data: bool, has_given_scales: bool = False
) -> dict[str, Any]:
    """The choices, with those that are None made; corrected targets choose what they need.

    Args:
        choices: Values of `FOLLOWING`.
        bits: Of the job's scheme, whatever its rules say.
        uses_data: Whether the job's method calibrates; one without data has no use for any of them.
        has_given_scales: As `quantlib.schemes.WeightScheme.has_given_scales`.

    >>> with_scheme_defaults(dict.fromkeys(FOLLOWING), bits=4, uses_data=True)["descent_passes"]
    0
    >>> with_scheme_defaults(dict.fromkeys(FOLLOWING), bits=3, uses_data=True)["propagation"]
    'quantized'
    """
    if choices["correct_targets"] and choices["propagation"] is None:
        choices = {**choices, "propagation": "quantized"}
    defaults = _BY_BITS[bits] if uses_data else _PLAIN
    if has_given_scales:
        defaults = {**defaults, **_GIVEN}
    made = {name: defaults[name] if value is None else value for name, value in choices.items()}
    if choices["correct_targets"] is None and made["propagation"] == "original":
        # With original activations there is nothing to correct.
        made["correct_targets"] = False
    return made
