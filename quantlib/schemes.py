"""What a quantized weight should look like, before any scale is fitted.

A scheme is data: bit width, symmetry and group size. The name that people type (``W4A16``, ``W8A16_ASYM``)
is looked up in one table.
"""

from dataclasses import dataclass

from quantlib.errors import RecipeError

WHOLE_ROW = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """A weight-only integer scheme.

    Attributes:
        bits: Bits of a stored code.
        is_symmetric: True when the zero point is the middle code for every group.
        group_size: Consecutive columns that share a scale; ``WHOLE_ROW`` (-1) for one scale a row.
    """

    bits: int
    is_symmetric: bool
    group_size: int

    @property
    def num_codes(self) -> int:
        """How many different codes there are (2 to the power of bits)."""
        return 1 << self.bits

    @property
    def middle_code(self) -> int:
        """The code that means zero in a symmetric scheme."""
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
        symmetry = "symmetric" if self.is_symmetric else "asymmetric"
        groups = "one scale a row" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        return f"{self.bits} bits, {symmetry}, {groups}"

    def num_groups(self, columns: int) -> int:
        """How many groups a row of ``columns`` columns has; a ragged last group counts.

        >>> WeightScheme(bits=4, is_symmetric=True, group_size=128).num_groups(576)
        5
        """
        return -(-columns // self.columns_per_group(columns))


_NAMED = {
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
SCHEME_NAMES = tuple(_NAMED)


def scheme_from_name(name: str, group_size: int) -> WeightScheme:
    """The scheme a person asked for.

    Raises:
        RecipeError: The name is not in the table.

    >>> scheme_from_name("W4A16", 64)
    WeightScheme(bits=4, is_symmetric=True, group_size=64)
    """
    if name not in _NAMED:
        raise RecipeError(f"scheme {name!r} is not known; use one of {', '.join(SCHEME_NAMES)}", scheme=name)
    bits, is_symmetric = _NAMED[name]
    return WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)
