"""What a quantized weight should look like, before any scale is fitted.

A scheme is data: number format, bit width, symmetry and group size. The name that people type (``W4A16``,
``W8A16_ASYM``, ``MXFP4A16``) is looked up in one table.
"""

from dataclasses import dataclass

from quantlib.errors import RecipeError
from quantlib.grids.formats import INTEGER, PLAIN_SCALES, POWER_SCALES, SHORT_SCALES

WHOLE_ROW = -1
DEFAULT_GROUP_SIZE = 128
# Of the blocks of a GGUF file.
GGUF_GROUP_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How weights are stored.

    Attributes:
        bits: Bits of a stored code.
        is_symmetric: True when the zero point is the middle code for every group.
        group_size: Consecutive columns that share a scale; ``WHOLE_ROW`` (-1) for one scale a row.
        number: What a code is: ``int``, or a name of `quantlib.grids.formats.FLOAT_FORMATS`.
        scales: How a scale is stored: ``PLAIN_SCALES``, in the dtype of the output's layout,
            ``SHORT_SCALES``, in it with fewer bits, or ``POWER_SCALES``.
    """

    bits: int
    is_symmetric: bool
    group_size: int
    number: str = INTEGER
    scales: str = PLAIN_SCALES

    @property
    def num_codes(self) -> int:
        """How many different codes there are (2 to the power of bits)."""
        return 1 << self.bits

    @property
    def middle_code(self) -> int:
        """The code that means zero in a symmetric scheme of integers."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, columns: int) -> int:
        """Width of a group in a matrix of ``columns`` columns.

        >>> WeightScheme(bits=4, is_symmetric=True, group_size=-1).columns_per_group(576)
        576
        """
        return columns if self.group_size == WHOLE_ROW else self.group_size

    def __str__(self) -> str:
        """In words.

        >>> str(WeightScheme(bits=4, is_symmetric=True, group_size=128))
        '4 bits, symmetric, groups of 128'
        """
        kind = "symmetric" if self.is_symmetric else "asymmetric"
        if self.number != INTEGER:
            kind = f"floats {self.number}"
        groups = "one scale a row" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        return f"{self.bits} bits, {kind}, {groups}{_SCALES_IN_WORDS[self.scales]}"

    def num_groups(self, columns: int) -> int:
        """How many groups a row of ``columns`` columns has; a ragged last group counts.

        >>> WeightScheme(bits=4, is_symmetric=True, group_size=128).num_groups(576)
        5
        """
        return -(-columns // self.columns_per_group(columns))


_SCALES_IN_WORDS = {
    PLAIN_SCALES: "",
    POWER_SCALES: " with powers of two",
    SHORT_SCALES: " with scales of 7 bits",
}

# Integers, whose groups are a choice: bits, symmetry.
_INTEGERS = {
    "W2A16": (2, True),
    "W3A16": (3, True),
    "W4A16": (4, True),
    "W5A16": (5, True),
    "W6A16": (6, True),
    "W8A16": (8, True),
    "W2A16_ASYM": (2, False),
    "W3A16_ASYM": (3, False),
    "W4A16_ASYM": (4, False),
    "W5A16_ASYM": (5, False),
    "W6A16_ASYM": (6, False),
    "W8A16_ASYM": (8, False),
}
# Floats, whose groups are part of the format.
_FLOATS = {
    "FP8A16": WeightScheme(bits=8, is_symmetric=True, group_size=WHOLE_ROW, number="e4m3"),
    "MXFP4A16": WeightScheme(bits=4, is_symmetric=True, group_size=32, number="e2m1", scales=POWER_SCALES),
    "MXFP8A16": WeightScheme(bits=8, is_symmetric=True, group_size=32, number="e4m3", scales=POWER_SCALES),
}
INTEGER_NAMES, FLOAT_NAMES = tuple(_INTEGERS), tuple(_FLOATS)
SCHEME_NAMES = (*INTEGER_NAMES, *FLOAT_NAMES)


def has_own_groups(name: str) -> bool:
    """Whether the group size is part of a scheme, so that no other can be asked for.

    >>> has_own_groups("W4A16"), has_own_groups("MXFP4A16")
    (False, True)
    """
    return name in _FLOATS


def scheme_from_name(name: str, group_size: int | None = None) -> WeightScheme:
    """The scheme a person asked for.

    Args:
        group_size: None for the scheme's own, or ``DEFAULT_GROUP_SIZE`` where it has none.

    Raises:
        RecipeError: The name is not in the table, or the scheme has another group size.

    >>> str(scheme_from_name("W4A16", 64))
    '4 bits, symmetric, groups of 64'
    >>> str(scheme_from_name("MXFP4A16"))
    '4 bits, floats e2m1, groups of 32 with powers of two'
    """
    if name in _FLOATS:
        own = _FLOATS[name]
        if group_size not in (None, own.group_size):
            raise RecipeError(
                f"scheme {name} has a group size of its own, {own.group_size}, found {group_size};"
                " leave group_size out",
                option="group_size",
                scheme=name,
            )
        return own
    if name not in _INTEGERS:
        raise RecipeError(f"scheme {name!r} is not known; use one of {', '.join(SCHEME_NAMES)}", scheme=name)
    bits, is_symmetric = _INTEGERS[name]
    size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    return WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=size)
