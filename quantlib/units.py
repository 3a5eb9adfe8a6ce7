"""Amounts of memory as people write them."""

import re

from quantlib.errors import RecipeError

_FACTORS = {"": 1} | {
    f"{letter}{binary}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("KMGT", start=1)
    for binary in ("", "I")
}


def parse_bytes(text: str, option: str) -> int:
    """How many bytes an amount is.

    Args:
        option: Its name, for the error.

    Raises:
        RecipeError: It is no positive number with a unit of bytes.

    >>> parse_bytes("1.5GB", "x"), parse_bytes("512 MiB", "x"), parse_bytes("4096", "x")
    (1500000000, 536870912, 4096)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _FACTORS.get(found[2].upper(), 0)) if found else 0
    if size <= 0:
        raise RecipeError(f"{option} must be an amount such as 24GB or 512MiB, found {text!r}", option=option)
    return size


def format_bytes(size: int) -> str:
    """Rounded up, so that it is enough where it is asked for.

    >>> format_bytes(1_234_567_890), format_bytes(12_300_000), format_bytes(999)
    ('1.24 GB', '12.3 MB', '1 KB')
    """
    for name, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            # Three digits.
            step = factor // 100 if size < 10 * factor else factor // 10 if size < 100 * factor else factor
            rounded = -(-size // step) * step
            return f"{rounded / factor:g} {name}"
    return f"{-(-size // 1000)} KB"
