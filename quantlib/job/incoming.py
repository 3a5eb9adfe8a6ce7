"""What a pass over a prefix looks for, and what it says of each checkpoint; `incoming_pass` makes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Options that a pass gives every run itself, or that are about one run only.
OF_A_CHECKPOINT = ("source", "output", "work", "replay")
# What a pass says of a checkpoint.
STATES = {
    "made": "all outputs are there",
    "started": "this pass began a run",
    "running": "a run has not ended",
    "waiting": "as many runs as are allowed have not ended",
    "settling": "its files came a short while ago",
    "incomplete": "it is not whole, or damaged",
    "failed": "the run could not be begun; the next pass tries again",
    "parked": "it failed as often as is allowed",
    "occupied": "something else lies where an output goes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """What a pass looks for, and what it has made of it.

    Attributes:
        prefix: Address below which checkpoints appear.
        outputs: Outputs go to ``outputs/CHECKPOINT/RECIPE``.
        recipes: Name -> option values, without `OF_A_CHECKPOINT`.
        state: Address of the records; None for a folder below ``outputs``.
        depth: How many folders below the prefix a checkpoint may lie.
        settle_s: How long no file of a checkpoint may have changed.
        runs_at_a_time: How many runs may be begun and not have ended.
        attempts: How often a checkpoint may fail.
        retry_parked: Forget what failed, of checkpoints that failed so often.
    """

    prefix: str
    outputs: str
    recipes: Mapping[str, Mapping[str, Any]]
    state: str | None
    depth: int
    settle_s: float
    runs_at_a_time: int
    attempts: int
    retry_parked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a pass says of one checkpoint.

    Attributes:
        checkpoint: Its path below the prefix.
        state: One of `STATES`.
        reason: Why, where that needs a word.
        run_id: Of the run that was begun last, if any.
        outputs: Addresses of its outputs, where they are known.
    """

    checkpoint: str
    state: str
    reason: str = ""
    run_id: str | None = None
    outputs: tuple[str, ...] = ()


def summary_of(rows: Sequence[Row], prefix: str) -> str:
    """A pass in one sentence.

    >>> summary_of([], "s3://models/incoming")
    'no checkpoint was found below s3://models/incoming'
    """
    if not rows:
        return f"no checkpoint was found below {prefix}"
    counts = {state: sum(1 for row in rows if row.state == state) for state in STATES}
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{len(rows)} checkpoint(s) below {prefix}: {words}"
