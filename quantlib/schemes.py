"""What a quantized weight should look like, before any scale is fitted, and what is multiplied with it.

A scheme is data: number format, bit width, symmetry, which weights share a scale, and what inputs are
rounded to as the model runs. The name that people type (``W4A16``, ``W8A16_ASYM``, ``MXFP4A16``, ``NF4``,
``W8A8``) is looked up in one table.
"""

from dataclasses import dataclass, replace

from quantlib.errors import RecipeError
from quantlib.grids.formats import (
    CODEBOOKS,
    DIVIDED_SCALES,
    FLOAT_FORMATS,
    FULL_SCALES,
    INTEGER,
    NESTED_SCALES,
    PLAIN_SCALES,
    POWER_SCALES,
    SHORT_SCALES,
)

WHOLE_ROW = -1
WHOLE_TENSOR = 0
DEFAULT_GROUP_SIZE = 128
# Of the blocks of a GGUF file.
GGUF_GROUP_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """What inputs of linears are rounded to as a model runs: scales are found then, and none is stored.

    Attributes:
        bits: Bits of a code.
        number: What a code is, as in `WeightScheme`; integers are symmetric.
        group_size: Consecutive columns of a token that share a scale; ``WHOLE_ROW`` for one scale a token.
        scales: ``PLAIN_SCALES``, in the dtype of the inputs, or ``POWER_SCALES``.
    """

    bits: int
    number: str
    group_size: int = WHOLE_ROW
    scales: str = PLAIN_SCALES

    def __str__(self) -> str:
        """In words.

        >>> str(ActivationScheme(bits=8, number="int"))
        '8-bit int by token'
        """
        groups = "token" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        powers = " with powers of two" if self.scales == POWER_SCALES else ""
        return f"{self.bits}-bit {self.number} by {groups}{powers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How weights are stored.

    Attributes:
        bits: Bits of a stored code.
        is_symmetric: True when the zero point is the middle code for every group.
        group_size: Consecutive columns that share a scale; ``WHOLE_ROW`` (-1) for one scale a row,
            ``WHOLE_TENSOR`` (0) for one of the whole weight.
        number: What a code is: ``int``, or a name of `quantlib.grids.formats.FLOAT_FORMATS` or ``CODEBOOKS``.
        scales: How a scale is stored: ``PLAIN_SCALES``, in the dtype of the output's layout, or another kind
            of `quantlib.grids.formats`.
        block_rows: Consecutive rows that share the scales of their groups; not said of whole weights.
        inputs: What is multiplied with them is rounded to; None where inputs stay as they are.
    """

    bits: int
    is_symmetric: bool
    group_size: int
    number: str = INTEGER
    scales: str = PLAIN_SCALES
    block_rows: int = 1
    inputs: ActivationScheme | None = None

    @property
    def has_given_scales(self) -> bool:
        """Whether no row has a scale of its own, so that all follow from the whole weight."""
        return self.group_size == WHOLE_TENSOR or self.block_rows > 1 or self.scales == NESTED_SCALES

    @property
    def owes_to_whole(self) -> bool:
        """Whether a scale depends on more than the weights that share it."""
        return self.has_given_scales or self.scales == DIVIDED_SCALES

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
        return self.group_size if self.group_size > 0 else columns

    def __str__(self) -> str:
        """In words.

        >>> str(WeightScheme(bits=4, is_symmetric=True, group_size=128))
        '4 bits, symmetric, groups of 128'
        """
        kind = "symmetric" if self.is_symmetric else "asymmetric"
        if self.number in FLOAT_FORMATS:
            kind = f"floats {self.number}"
        elif self.number in CODEBOOKS:
            kind = f"codebook {self.number}"
        shared = {WHOLE_ROW: "one scale a row", WHOLE_TENSOR: "one scale"}
        groups = shared.get(self.group_size, f"groups of {self.group_size}")
        if self.block_rows > 1:
            groups = f"blocks of {self.block_rows} x {self.group_size}"
        inputs = "" if self.inputs is None else f", inputs rounded to {self.inputs}"
        return f"{self.bits} bits, {kind}, {groups}{_SCALES_SAID.get(self.scales, '')}{inputs}"

    def num_groups(self, columns: int) -> int:
        """How many groups a row of ``columns`` columns has; a ragged last group counts.

        >>> WeightScheme(bits=4, is_symmetric=True, group_size=128).num_groups(576)
        5
        """
        return -(-columns // self.columns_per_group(columns))


_SCALES_SAID = {
    POWER_SCALES: " with powers of two",
    DIVIDED_SCALES: " with scales e4m3 over a divisor",
    NESTED_SCALES: " with quantized scales",
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
_E4M3 = WeightScheme(bits=8, is_symmetric=True, group_size=WHOLE_ROW, number="e4m3")
_NF4 = WeightScheme(bits=4, is_symmetric=True, group_size=64, number="nf4", scales=FULL_SCALES)
# Floats and codebooks, whose groups are part of the format.
_WEIGHTS_ALONE = {
    "FP8A16": _E4M3,
    "FP8A16_TENSOR": replace(_E4M3, group_size=WHOLE_TENSOR),
    "FP8A16_BLOCK": replace(_E4M3, group_size=128, block_rows=128),
    "MXFP4A16": WeightScheme(bits=4, is_symmetric=True, group_size=32, number="e2m1", scales=POWER_SCALES),
    "MXFP8A16": WeightScheme(bits=8, is_symmetric=True, group_size=32, number="e4m3", scales=POWER_SCALES),
    "NVFP4A16": WeightScheme(bits=4, is_symmetric=True, group_size=16, number="e2m1", scales=DIVIDED_SCALES),
    "NF4": _NF4,
    "NF4_DQ": replace(_NF4, scales=NESTED_SCALES),
    "FP4": replace(_NF4, number="fp4"),
    "FP4_DQ": replace(_NF4, number="fp4", scales=NESTED_SCALES),
}
_ROWS_OF_BYTES = WeightScheme(bits=8, is_symmetric=True, group_size=WHOLE_ROW)


def _with_inputs_alike(weights: WeightScheme) -> WeightScheme:
    """Inputs are rounded to what weights are: one scale a token where these have one a row or a weight."""
    group_size = WHOLE_ROW if weights.group_size == WHOLE_TENSOR else weights.group_size
    inputs = ActivationScheme(
        bits=weights.bits, number=weights.number, group_size=group_size, scales=weights.scales
    )
    return replace(weights, inputs=inputs)


# Weights as those of another scheme, and inputs too; named as compressed-tensors' presets are, which has none
# for whole weights.
_ROUNDED_INPUTS = {
    "W8A8": _with_inputs_alike(_ROWS_OF_BYTES),
    "FP8_DYNAMIC": _with_inputs_alike(_WEIGHTS_ALONE["FP8A16"]),
    "FP8_DYNAMIC_TENSOR": _with_inputs_alike(_WEIGHTS_ALONE["FP8A16_TENSOR"]),
    "FP8_BLOCK": _with_inputs_alike(_WEIGHTS_ALONE["FP8A16_BLOCK"]),
    "MXFP4": _with_inputs_alike(_WEIGHTS_ALONE["MXFP4A16"]),
    "MXFP8": _with_inputs_alike(_WEIGHTS_ALONE["MXFP8A16"]),
}
_OWN_GROUPS = {**_WEIGHTS_ALONE, **_ROUNDED_INPUTS}
INTEGER_NAMES, ROUNDED_INPUTS_NAMES = tuple(_INTEGERS), tuple(_ROUNDED_INPUTS)
FLOAT_NAMES = tuple(name for name, scheme in _WEIGHTS_ALONE.items() if scheme.number in FLOAT_FORMATS)
CODEBOOK_NAMES = tuple(name for name, scheme in _WEIGHTS_ALONE.items() if scheme.number in CODEBOOKS)
SCHEME_NAMES = (*INTEGER_NAMES, *FLOAT_NAMES, *ROUNDED_INPUTS_NAMES, *CODEBOOK_NAMES)


def groups_said(group_size: int) -> str:
    """A group size in words.

    >>> groups_said(128), groups_said(WHOLE_ROW), groups_said(WHOLE_TENSOR)
    ('group 128', 'whole rows', 'whole weights')
    """
    return {WHOLE_ROW: "whole rows", WHOLE_TENSOR: "whole weights"}.get(group_size, f"group {group_size}")


def group_tag(group_size: int) -> str:
    """A group size in a name.

    >>> group_tag(128), group_tag(WHOLE_ROW), group_tag(WHOLE_TENSOR)
    ('g128', 'row', 'tensor')
    """
    return {WHOLE_ROW: "row", WHOLE_TENSOR: "tensor"}.get(group_size, f"g{group_size}")


def has_own_groups(name: str) -> bool:
    """Whether the group size is part of a scheme, so that no other can be asked for.

    >>> has_own_groups("W4A16"), has_own_groups("MXFP4A16")
    (False, True)
    """
    return name in _OWN_GROUPS


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
    >>> str(scheme_from_name("FP8A16_BLOCK"))
    '8 bits, floats e4m3, blocks of 128 x 128'
    """
    if name in _OWN_GROUPS:
        own = _OWN_GROUPS[name]
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
