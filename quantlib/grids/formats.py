"""Number formats and kinds of scales as data: which values a code can mean, in units of its scale."""

import math
from dataclasses import dataclass

INTEGER = "int"
# How a scale is stored: as a number of the dtype that the output's layout has for scales, as a power of two
# in a byte (E8M0), as an E4M3 number over a divisor of the whole weight, as fp32, as a code of
# `dynamic_values` with a factor for many of them and an offset of the whole weight, or as a number of the
# layout's dtype with 7 significant bits: fp16 holds its product with every zero point of 4 bits exactly.
PLAIN_SCALES, POWER_SCALES, DIVIDED_SCALES, FULL_SCALES, NESTED_SCALES, SHORT_SCALES = (
    "plain",
    "e8m0",
    "e4m3",
    "fp32",
    "nested",
    "7-bit",
)
# As plain ones, but of values that all layouts' dtypes have: the same codes can be written in any layout.
PORTABLE_SCALES = "portable"


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A small binary float: a sign, an exponent and a mantissa, subnormal numbers, no infinity.

    Attributes:
        bits: Of a code, whose highest bit is the sign.
        mantissa_bits: Of these.
        smallest_exponent: Of a normal number.
        largest: The largest finite value; what is larger saturates to it.
    """

    bits: int
    mantissa_bits: int
    smallest_exponent: int
    largest: float

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """Finite values that are not negative, in the order of their codes.

        >>> FLOAT_FORMATS["e2m1"].magnitudes
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        """
        values = (self._magnitude(code) for code in range(1 << (self.bits - 1)))
        return tuple(value for value in values if value <= self.largest)

    @property
    def largest_power(self) -> float:
        """The largest power of two among the values.

        >>> FLOAT_FORMATS["e4m3"].largest_power
        256.0
        """
        return 2.0 ** (math.frexp(self.largest)[1] - 1)

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        leading = 1 if exponent else 0
        significand = leading + mantissa / (1 << self.mantissa_bits)
        return significand * 2.0 ** (max(exponent, 1) - 1 + self.smallest_exponent)


# OCP Microscaling Formats (MX) 1.0, section 5.3; OCP 8-bit Floating Point (OFP8) 1.0.
FLOAT_FORMATS = {
    "e2m1": FloatFormat(bits=4, mantissa_bits=1, smallest_exponent=0, largest=6.0),
    "e4m3": FloatFormat(bits=8, mantissa_bits=3, smallest_exponent=-6, largest=448.0),
}

# Values in the order of their codes. NF4: quantiles of the normal distribution, with a zero and both ends
# (QLoRA, arXiv 2305.14314, section 3 and appendix E). FP4: those of bitsandbytes, a sign, two bits of
# exponent and one of mantissa, twelfths; not e2m1.
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(
        sign * twelfths / 12 for sign in (1, -1) for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}


def dynamic_values() -> tuple[float, ...]:
    """The 256 values of the dynamic map, ascending: exponents of ten and a linear fraction of what is left.

    For i = 0 .. 6 the means of 2**i equal parts of [0.1, 1], times 10**(i - 6), of both signs; 0 and 1.

    Source: Dettmers, 8-bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561), as
    bitsandbytes has it.

    >>> values = dynamic_values()
    >>> len(values), values[127], values[-1], round(values[-2], 6), round(sum(values), 9)
    (256, 0.0, 1.0, 0.992969, 1.0)
    """
    values = [0.0, 1.0]
    for i in range(7):
        num_parts = 1 << i
        for part in range(num_parts):
            mean = (0.1 + 0.9 * (part + 0.5) / num_parts) * 10.0 ** (i - 6)
            values += [mean, -mean]
    return tuple(sorted(values))
