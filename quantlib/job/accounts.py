"""What becomes of every tensor of a source, summed up: state, reason, count, and patterns of the names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Quantized weights, biases moved to make up for them, tensors as they are, and those that are left out.
QUANTIZED, CORRECTED, COPIED, DROPPED = STATES = ("quantized", "corrected", "copied", "dropped")

_FEW = 3
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Source tensors of one state and reason.

    Attributes:
        state: One of `STATES`.
        reason: Why, or how.
        count: How many tensors.
        size_bytes: Their size in the source.
        names: Patterns of their names, sorted; see `pattern_of`.
    """

    state: str
    reason: str
    count: int
    size_bytes: int
    names: tuple[str, ...]


def pattern_of(name: str) -> str:
    """A tensor's name with ``*`` for every number in it, of which a model has many.

    >>> pattern_of("model.layers.17.mlp.experts.3.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return _NUMBER.sub("*", name)


def summed_up(tensors: Iterable[tuple[str, str, str, int]]) -> tuple[Account, ...]:
    """Accounts of tensors, in the order of `STATES`, the largest first.

    Args:
        tensors: Name, state, reason and size in bytes of each.
    """
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, state, reason, size_bytes in tensors:
        found.setdefault((state, reason), []).append((name, size_bytes))
    accounts = [
        Account(
            state=state,
            reason=reason,
            count=len(members),
            size_bytes=sum(size_bytes for _, size_bytes in members),
            names=tuple(sorted({pattern_of(name) for name, _ in members})),
        )
        for (state, reason), members in found.items()
    ]
    return tuple(
        sorted(accounts, key=lambda found: (STATES.index(found.state), -found.size_bytes, found.reason))
    )


def account_lines(accounts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of accounts for a terminal, one line each; names stand there where they are few."""
    counts = [f"{account['count']:,}" for account in accounts]
    sizes = [f"{account['size_bytes'] / 1e6:,.1f} MB" for account in accounts]
    widths = [max(map(len, cells), default=0) for cells in (counts, sizes)]
    return [
        f"{account['state']:<9}  {count:>{widths[0]}}  {size:>{widths[1]}}  {_reason(account)}"
        for account, count, size in zip(accounts, counts, sizes, strict=True)
    ]


def _reason(account: Mapping[str, Any]) -> str:
    names = account["names"]
    return account["reason"] + (f" ({', '.join(names)})" if len(names) <= _FEW else "")
