"""One row of a comparison as people write it: ``[method:]SCHEME[@GROUP]``.

What an entry leaves out, the options of the job say.
"""

import re
from dataclasses import dataclass

from quantlib.errors import RecipeError
from quantlib.job.option_table import check_value
from quantlib.job.options import option_fields
from quantlib.schemes import group_tag, has_own_groups, scheme_from_name

FORM = "[method:]SCHEME[@GROUP]"
_FORM = re.compile(r"(?:([^:@]*):)?([^:@]*)(?:@([^:@]*))?")
_NUMBER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeEntry:
    """How one output of a comparison is quantized.

    Attributes:
        method: ``gptq`` or ``rtn``.
        scheme: One of `quantlib.schemes.SCHEME_NAMES`.
        group_size: Columns that share a scale; -1 for one scale a row, 0 for one a weight.
    """

    method: str
    scheme: str
    group_size: int

    def __str__(self) -> str:
        """As `entry_from` reads it.

        >>> str(SchemeEntry(method="gptq", scheme="W4A16", group_size=64))
        'gptq:W4A16@64'
        """
        return f"{self.method}:{self.scheme}@{self.group_size}"

    @property
    def folder(self) -> str:
        """Name of its output.

        >>> SchemeEntry(method="rtn", scheme="W8A16", group_size=-1).folder
        'rtn-W8A16-row'
        """
        return f"{self.method}-{self.scheme}-{group_tag(self.group_size)}"


def entry_from(text: str, *, method: str, group_size: int | None) -> SchemeEntry:
    """Read one entry.

    Args:
        text: What a person wrote.
        method: Of an entry that names none.
        group_size: Likewise, unless its scheme has groups of its own; None for the scheme's.

    Raises:
        RecipeError: It has another form, or names a method, scheme or group size that there is not.

    >>> str(entry_from("W3A16_ASYM@64", method="gptq", group_size=128))
    'gptq:W3A16_ASYM@64'
    >>> str(entry_from("rtn:W8A16", method="gptq", group_size=None))
    'rtn:W8A16@128'
    >>> str(entry_from("MXFP4A16", method="gptq", group_size=64))
    'gptq:MXFP4A16@32'
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise RecipeError(
            f"schemes: an entry is {FORM}, as in rtn:W4A16@64; found {text!r}", option="schemes"
        )
    named_method, scheme, named_group = found.groups()
    if named_group is not None and not _NUMBER.fullmatch(named_group):
        raise RecipeError(
            f"schemes: the group size of {text!r} must be a whole number, found {named_group!r}; leave @ out"
            " for that of the job, or write @-1 for one scale a row",
            option="schemes",
        )
    if named_group is not None:
        group_size = int(named_group)
    elif has_own_groups(scheme):
        group_size = None
    values = {
        "method": method if named_method is None else named_method,
        "scheme": scheme,
        "group_size": group_size,
    }
    try:
        for name, value in values.items():
            check_value(name, value, option_fields()[name][0])
        own = scheme_from_name(scheme, group_size).group_size
    except RecipeError as error:
        raise RecipeError(f"schemes: {text!r}: {error.message}", option="schemes") from error
    return SchemeEntry(method=values["method"], scheme=scheme, group_size=own)
