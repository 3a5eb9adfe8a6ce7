"""A block of the report in one line of figures, for tables and logs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlib.job.report_figures import block_seconds, is_number, linear_kind, number


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFigures:
    """What a person wants to see of a block first; None where it was not measured.

    Attributes:
        index: Of the block, from 0.
        relative_error: Of the quantized stream behind the block, on evaluation text.
        cosine: Of the two streams there.
        worst_error: Largest relative error among its linears, on calibration text.
        worst_linear: Whose that is, without the block's name.
        damping: Largest share of the mean diagonal that was added before a factorization.
        fallbacks: Kind of fallback -> how many linears took it.
        seconds: Of all its stages.
    """

    index: int
    relative_error: float | None
    cosine: float | None
    worst_error: float | None
    worst_linear: str | None
    damping: float | None
    fallbacks: Mapping[str, int]
    seconds: float


def block_figures(row: Mapping[str, Any]) -> BlockFigures:
    """The figures of an entry of ``blocks`` of a report."""
    linears: Sequence[Mapping[str, Any]] = row.get("linears") or ()
    measured = [linear for linear in linears if is_number(linear.get("relative_error"))]
    worst = max(measured, key=lambda linear: linear["relative_error"], default=None)
    damping = [linear["damping_fraction"] for linear in linears if is_number(linear.get("damping_fraction"))]
    kinds = sorted(str(linear["fallback"]) for linear in linears if linear.get("fallback"))
    return BlockFigures(
        index=row["index"],
        relative_error=row.get("relative_error"),
        cosine=row.get("cosine"),
        worst_error=None if worst is None else worst["relative_error"],
        worst_linear=None if worst is None else linear_kind(str(worst["name"])),
        damping=max(damping, default=None),
        fallbacks={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        seconds=block_seconds(row),
    )


def block_words(found: BlockFigures) -> str:
    """The figures as a log has them.

    >>> row = {"index": 0, "cosine": 0.9995, "seconds": {"solve": 3.25},
    ...        "linears": [{"name": "model.layers.0.mlp.up_proj", "relative_error": 0.0512}]}
    >>> block_words(block_figures(row))
    'cosine 0.9995, worst linear mlp.up_proj 0.0512, 3.2 s'
    """
    words = (
        f"relative error {number(found.relative_error)}" if found.relative_error is not None else None,
        f"cosine {number(found.cosine, 6)}" if found.cosine is not None else None,
        f"worst linear {found.worst_linear} {number(found.worst_error)}" if found.worst_linear else None,
        f"{found.seconds:.1f} s" if found.seconds else None,
    )
    return ", ".join(filter(None, words))


def fallback_words(fallbacks: Mapping[str, int]) -> str:
    """How many linears took which fallback.

    >>> fallback_words({"more_damping": 1, "rtn_no_tokens": 12})
    '1 x more_damping, 12 x rtn_no_tokens'
    """
    return ", ".join(f"{count} x {kind}" for kind, count in fallbacks.items())
