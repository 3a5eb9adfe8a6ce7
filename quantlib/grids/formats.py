"""Number formats as data: which values a code can mean, in units of its scale."""

import math
from dataclasses import dataclass

INTEGER = "int"
# How a scale is stored: as a number of the dtype that the output's layout has for scales, as a power of two
# in a byte (E8M0), or as a number of that dtype with 7 significant bits: fp16 holds its product with every
# zero point of 4 bits exactly.
PLAIN_SCALES, POWER_SCALES, SHORT_SCALES = "plain", "e8m0", "7-bit"


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
