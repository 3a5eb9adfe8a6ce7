"""What is done about each kind of failure: one table.

Every front end and runner asks here. ``retry`` calls the same stage again after a while; ``renew`` starts the
workers anew (elsewhere, or fewer of them) and goes on from the last checkpoint of the activations; ``stop``
ends the run with its one error, and the same command resumes it. An error of another project is a defect and
always stops.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from quantlib.errors import ChecksumError, QuantError, TransientStorageError, WorkerLostError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done about a kind of error.

    Attributes:
        action: ``retry``, ``renew`` or ``stop``.
        attempts: How often, before the run is stopped after all. Renewals are counted anew whenever a unit
            was finished in between.
        first_delay_s: Wait before the first attempt; doubled each time.
        max_delay_s: Longest wait.
    """

    action: Literal["retry", "renew", "stop"]
    attempts: int = 0
    first_delay_s: float = 0.0
    max_delay_s: float = 30.0


STOP = Policy(action="stop")

# The first class that fits decides. The storage engines have retried for minutes before they raise.
POLICIES: tuple[tuple[type[QuantError], Policy], ...] = (
    (TransientStorageError, Policy(action="retry", attempts=4, first_delay_s=2.0)),
    (ChecksumError, Policy(action="retry", attempts=2, first_delay_s=1.0)),
    (WorkerLostError, Policy(action="renew", attempts=3, first_delay_s=2.0)),
    (QuantError, STOP),
)

# Delays are stretched or shortened by up to this share, so that many workers do not ask again together.
JITTER = 0.5


def policy_for(error: object) -> Policy:
    """The row of the table for an error; `STOP` for what is none of ours."""
    return next((policy for kind, policy in POLICIES if isinstance(error, kind)), STOP)


def delay_s(policy: Policy, attempt: int) -> float:
    """Seconds to wait before an attempt, the first being 1."""
    whole = min(policy.max_delay_s, policy.first_delay_s * 2.0 ** (attempt - 1))
    return whole * random.uniform(1.0 - JITTER, 1.0 + JITTER)


def retrying(wait: Callable[[float], object], function: Callable[..., T], *arguments: object) -> T:
    """Call, and call again as long as the table says so; for runners without retries of their own.

    Args:
        wait: Waits for so many seconds; true when no further attempt is wanted.

    Raises:
        QuantError: The last attempt's.
    """
    attempt = 0
    while True:
        try:
            return function(*arguments)
        except QuantError as error:
            policy = policy_for(error)
            attempt += 1
            if policy.action != "retry" or attempt > policy.attempts or wait(delay_s(policy, attempt)):
                raise
