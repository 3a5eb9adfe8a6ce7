"""What integers each output format can hold, for tests that draw linears for all of them."""

from quantlib.packing import FORMATS
from quantlib.schemes import INTEGER_NAMES, scheme_from_name

HELD_BITS = {"compressed-tensors": (2, 3, 4, 5, 6, 8), "gptq": (2, 3, 4, 8), "awq": (4,)}
# Out and in features are multiples of these.
SIDES = {"compressed-tensors": (1, 1), "gptq": (32, 32), "awq": (8, 1)}
FORMATS_AND_BITS = [(name, bits) for name in FORMATS for bits in HELD_BITS[name]]
FORMATS_AND_SCHEMES = [
    (name, scheme)
    for name in FORMATS
    for scheme in INTEGER_NAMES
    if scheme_from_name(scheme, 32).bits in HELD_BITS[name]
]
