"""Outputs in several layouts from one request, and which outputs can be packed from one solve."""

import dataclasses
from collections.abc import Sequence

from quantlib.errors import RecipeError
from quantlib.grids.formats import PORTABLE_SCALES, POWER_SCALES
from quantlib.job.option_table import names_in
from quantlib.job.options import JobOptions
from quantlib.job.plan import Plan
from quantlib.solver_settings import SolverSettings
from quantlib.storage.uris import join_uri

# In which dtype a layout stores plain scales; None for that of the model.
SCALE_DTYPES = {
    "compressed-tensors": None,
    "gptq": "float16",
    "awq": "float16",
    "bitsandbytes": "bfloat16",
    "gguf": "float16",
}
# Kinds of scales that are equal whatever the layout.
_SAME_ANYWHERE = {PORTABLE_SCALES, POWER_SCALES}


def formats_of(options: JobOptions) -> list[str]:
    """The layouts that a request names, in its order."""
    assert options.format is not None  # Chosen by `options_from`.
    return names_in(options.format)


def requests_of_formats(options: JobOptions) -> tuple[JobOptions, ...]:
    """A request for each layout that a request names; of one layout the request itself.

    Outputs, and work prefixes if one is named, lie below those of the request and are named by the layout.
    """
    formats = formats_of(options)
    if len(formats) == 1:
        return (dataclasses.replace(options, format=formats[0]),)
    is_mixed = len({SCALE_DTYPES[name] for name in formats}) > 1
    return tuple(
        dataclasses.replace(
            options,
            format=name,
            output=join_uri(options.output, name),
            work=None if options.work is None else join_uri(options.work, name),
            portable_scales=options.portable_scales or is_mixed,
        )
        for name in formats
    )


def only_format(options: JobOptions, what: str) -> str:
    """The layout of a request that must name one.

    Args:
        what: What takes no more, as the subject of a sentence.

    Raises:
        RecipeError: It names several.
    """
    formats = formats_of(options)
    if len(formats) > 1:
        raise RecipeError(
            f"{what} has one format, found {', '.join(formats)}; name one of these", option="format"
        )
    return formats[0]


def solvers_of(plans: Sequence[Plan]) -> tuple[int, ...]:
    """Of every plan the first one whose codes, zero points and scales are its own too.

    Args:
        plans: Of one source, with equal values of all options that outputs of one reading must share.
    """
    found: list[int] = []
    for plan in plans:
        alike = (other for other in range(len(found)) if _are_codes_equal(plans[other], plan))
        found.append(next(alike, len(found)))
    return tuple(found)


def _are_codes_equal(one: Plan, other: Plan) -> bool:
    settings = [SolverSettings.from_options(plan.options) for plan in (one, other)]
    # Activations that calibrate begin with the levels of the embedding then.
    if one.rounded != other.rounded and one.options["propagation"] == "quantized":
        return False
    if one.blocks != other.blocks or settings[0] != settings[1]:
        return False
    kinds = {linear.scheme.scales for block in one.blocks for linear in block.linears if linear.scheme}
    formats = [plan.options["format"] for plan in (one, other)]
    return kinds <= _SAME_ANYWHERE or len({SCALE_DTYPES[name] for name in formats}) == 1
