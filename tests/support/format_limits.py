"""What integers each output format can hold, for tests that draw linears for all of them."""

from quantlib import packing
from quantlib.packing import FORMATS
from quantlib.schemes import INTEGER_NAMES, WHOLE_ROW, WeightScheme, scheme_from_name

HELD_BITS = {
    "compressed-tensors": (2, 3, 4, 5, 6, 8),
    "gptq": (2, 3, 4, 8),
    "awq": (4,),
    "bitsandbytes": (8,),
    "gguf": (4, 8),
}
# Out and in features are multiples of these.
SIDES = {
    "compressed-tensors": (1, 1),
    "gptq": (32, 32),
    "awq": (8, 1),
    "bitsandbytes": (1, 1),
    "gguf": (1, 32),
}
# These hold nothing but symmetric codes with one scale a row.
ROWS_ONLY = ("bitsandbytes",)
# The only group size of a format that has one.
GROUP_SIZES = {"bitsandbytes": WHOLE_ROW, "gguf": 32}
FORMATS_AND_BITS = [(name, bits) for name in FORMATS for bits in HELD_BITS[name]]


def symmetries(format_name: str, bits: int | None = None) -> tuple[bool, ...]:
    """Whether symmetric schemes, and whether asymmetric ones, can be held; of some width, or of any."""
    is_symmetric_only = format_name in ROWS_ONLY or (format_name == "gguf" and bits == 8)
    return (True,) if is_symmetric_only else (True, False)


def held_group_size(format_name: str, group_size: int) -> int:
    """This one, or the only one there is."""
    return GROUP_SIZES.get(format_name, group_size)


def scheme_for(format_name: str, name: str, group_size: int) -> WeightScheme:
    """A scheme by its name, as a job has it for a format."""
    return packing.held_scheme(format_name, scheme_from_name(name, held_group_size(format_name, group_size)))


def held_scheme(format_name: str, *, is_symmetric: bool = True) -> WeightScheme:
    """One of 4 bits and groups of 32, or the nearest to it."""
    scheme = WeightScheme(
        bits=4 if 4 in HELD_BITS[format_name] else HELD_BITS[format_name][0],
        is_symmetric=is_symmetric or format_name in ROWS_ONLY,
        group_size=held_group_size(format_name, 32),
    )
    return packing.held_scheme(format_name, scheme)


FORMATS_AND_SCHEMES = [
    (name, scheme)
    for name in FORMATS
    for scheme in INTEGER_NAMES
    if scheme_from_name(scheme, 32).bits in HELD_BITS[name]
    and scheme_from_name(scheme, 32).is_symmetric in symmetries(name, int(scheme[1]))
]
