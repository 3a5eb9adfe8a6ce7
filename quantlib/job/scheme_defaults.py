"""Choices of the solver that follow from the bits asked for, where nobody made them.

Below 4 bits the quantized blocks disturb the activations enough for corrected targets to be worth a second
stream, and a descent and a refit gain many times what they gain at 4 bits. Scales weighted by the inverse of
the Hessian are better at 3 bits; at 2 and 4 it depends on the model. What each is worth and costs, row by
row: ``tests/benchmarks/variants.md``.
"""

from collections.abc import Mapping
from typing import Any

_CAREFUL: dict[str, Any] = {
    "propagation": "quantized",
    "correct_targets": True,
    "descent_passes": 2,
    "refit_scales": True,
    "scale_search": "hessian",
}
_PLAIN: dict[str, Any] = {
    "propagation": "original",
    "correct_targets": False,
    "descent_passes": 0,
    "refit_scales": False,
    "scale_search": "hessian",
}
_BY_BITS = {2: _CAREFUL, 3: {**_CAREFUL, "scale_search": "inverse-hessian"}, 4: _PLAIN, 8: _PLAIN}
FOLLOWING = tuple(_PLAIN)


def with_scheme_defaults(choices: Mapping[str, Any], *, bits: int, uses_data: bool) -> dict[str, Any]:
    """The choices, with those that are None made; corrected targets choose what they need.

    Args:
        choices: Values of `FOLLOWING`.
        bits: Of the job's scheme, whatever its rules say.
        uses_data: Whether the job's method calibrates; one without data has no use for any of them.

    >>> with_scheme_defaults(dict.fromkeys(FOLLOWING), bits=4, uses_data=True)["descent_passes"]
    0
    >>> with_scheme_defaults(dict.fromkeys(FOLLOWING), bits=3, uses_data=True)["propagation"]
    'quantized'
    """
    if choices["correct_targets"] and choices["propagation"] is None:
        choices = {**choices, "propagation": "quantized"}
    defaults = _BY_BITS[bits] if uses_data else _PLAIN
    made = {name: defaults[name] if value is None else value for name, value in choices.items()}
    if choices["correct_targets"] is None and made["propagation"] == "original":
        # With original activations there is nothing to correct.
        made["correct_targets"] = False
    return made
