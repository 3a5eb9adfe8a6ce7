"""What integers each output format can hold, for tests that draw linears for all of them."""

from quantlib.packing import FORMATS
from quantlib.schemes import INTEGER_NAMES

HELD_BITS = {"compressed-tensors": (2, 3, 4, 5, 6, 8), "gptq": (2, 3, 4, 8), "awq": (4,), "gguf": (4, 8)}
# Out and in features are multiples of these.
SIDES = {"compressed-tensors": (1, 1), "gptq": (32, 32), "awq": (8, 1), "gguf": (1, 32)}
FORMATS_AND_BITS = [(name, bits) for name in FORMATS for bits in HELD_BITS[name]]
# Of the others any that divides a row.
GROUP_SIZES = {"gguf": (32,)}


def is_held(format_name: str, bits: int, *, is_symmetric: bool) -> bool:
    """Whether a format has codes of so many bits, with zero points or without."""
    return bits in HELD_BITS[format_name] and (is_symmetric or format_name != "gguf" or bits == 4)


FORMATS_AND_SCHEMES = [
    (name, scheme)
    for name in FORMATS
    for scheme in INTEGER_NAMES
    if is_held(name, int(scheme[1]), is_symmetric=not scheme.endswith("ASYM"))
]
