"""What a seed decides about one disturbed job: which faults, how many, and which blows at which moment.

A draw is plain data; `tests.support.chaos` carries it out. Moments are counted in requests that the proxy
saw, never in seconds, so that a slow machine meets the same draw.
"""

import random
from dataclasses import dataclass
from typing import Any, get_args

from tests.support.fault_proxy import Fault, Kind, Request

BLOCKS = 5
# An undisturbed job makes about this many requests.
USUAL_REQUESTS = 130
# One draw in so many loses Ray workers instead.
RAY_EVERY = 4

_KINDS: tuple[Kind, ...] = get_args(Kind)
_RATES = (0.02, 0.05, 0.1)
# Seconds during which storage is asked again: soon given up, or longer than a restart takes.
_PATIENCE_S = (0.4, 20.0)
_BLOWS: tuple[tuple[tuple[str, int], ...], ...] = (
    (),
    (("kill", 0),),
    (("restart", 0),),
    (("refuse", 0),),
    (("replace", 0),),
    (("kill", 0), ("damage shard", 1)),
    (("kill", 0), ("damage checkpoint", 1)),
    (("kill", 0), ("damage checkpoint", 1)),
    (("kill", 0), ("kill", 1)),
    (("kill", 0), ("refuse", 1)),
    (("kill", 0), ("restart", 1)),
    (("kill", 0), ("replace", 1)),
)
_THROTTLES = (
    (503, "SlowDown"),
    (503, "ServiceUnavailable"),
    (500, "InternalError"),
    (429, "TooManyRequests"),
)
_STAGES = ("capture", "solve", "evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """Something that happens once.

    Attributes:
        kind: ``kill`` the job's process, ``restart`` the server, ``refuse`` connections for ``seconds``,
            ``replace`` an object of the source; ``damage shard`` and ``damage checkpoint`` before a start.
        start: Which start of the job it strikes, from 0.
        at: Requests after that start began; for ``replace`` after the job was planned.
        chance: Chooses among what there is to strike.
    """

    kind: str
    start: int
    at: int
    seconds: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDraw:
    """A job from S3 to S3 through the proxy.

    Attributes:
        rates: Kind of fault -> share of the requests that could meet it.
        patience_s: For how long storage is asked again.
    """

    seed: int
    engine: str
    propagation: str
    checkpoint_every: int
    patience_s: float
    rates: dict[Kind, float]
    blows: tuple[Blow, ...]

    @property
    def disturbed_starts(self) -> int:
        """How many starts meet faults before the quiet one."""
        return 1 + max((blow.start for blow in self.blows), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDraw:
    """A job on two Ray workers. ``kills``: stage label -> number of the worker that dies as it begins."""

    seed: int
    propagation: str
    checkpoint_every: int
    kills: dict[str, int]


def draw_of(seed: int) -> StorageDraw | WorkerDraw:
    """The draw of a seed, always the same."""
    chosen = random.Random(f"draw {seed}")
    common: dict[str, Any] = {
        "seed": seed,
        "propagation": chosen.choice(("original", "quantized")),
        "checkpoint_every": chosen.choice((0, 1, 1, 2)),
    }
    if seed % RAY_EVERY == RAY_EVERY - 1:
        stages = [f"block {k + 1}/{BLOCKS}: {stage}" for k in range(BLOCKS) for stage in _STAGES]
        labels = chosen.sample(["plan", "embed", *stages, "head", "publish"], chosen.randint(1, 2))
        return WorkerDraw(**common, kills={label: chosen.randrange(2) for label in labels})
    return StorageDraw(
        **common,
        engine=chosen.choice(("obstore", "s3fs")),
        patience_s=chosen.choice(_PATIENCE_S),
        rates={kind: chosen.choice(_RATES) for kind in sorted(chosen.sample(_KINDS, chosen.randint(2, 6)))},
        blows=_blows(chosen),
    )


def _blows(chosen: random.Random) -> tuple[Blow, ...]:
    kinds = chosen.choice(_BLOWS)
    leaves_something = any(kind.startswith("damage") for kind, _ in kinds)
    return tuple(_blow(kind, start, leaves_something, chosen) for kind, start in kinds)


def _blow(kind: str, start: int, is_late: bool, chosen: random.Random) -> Blow:
    # A second start has less left to do, and so has a job that is planned.
    latest = USUAL_REQUESTS if start == 0 and kind != "replace" else USUAL_REQUESTS // 2
    return Blow(
        kind=kind,
        start=start,
        at=chosen.randrange(latest * 2 // 3 if is_late else 0, latest),
        seconds=round(chosen.uniform(0.3, 2.5), 1),
        chance=chosen.random(),
    )


def in_words(draw: StorageDraw | WorkerDraw) -> str:
    """The draw as a person would tell it."""
    head = (
        f"seed {draw.seed}: propagation {draw.propagation}, a checkpoint every {draw.checkpoint_every} blocks"
    )
    if isinstance(draw, WorkerDraw):
        return f"{head}; " + ", ".join(f"worker {n} killed at {label!r}" for label, n in draw.kills.items())
    rates = ", ".join(f"{kind} {rate:.0%}" for kind, rate in draw.rates.items())
    blows = "; ".join(_blow_in_words(blow) for blow in draw.blows)
    return f"{head}, {draw.engine} asking for {draw.patience_s} s; {rates}; {blows or 'no blow'}"


def _blow_in_words(blow: Blow) -> str:
    if blow.kind.startswith("damage"):
        return f"{blow.kind} before start {blow.start}"
    length = f" for {blow.seconds} s" if blow.kind == "refuse" else ""
    return f"{blow.kind} in start {blow.start} after {blow.at} requests{length}"


def fault_of(draw: StorageDraw, request: Request, chosen: random.Random, *, is_planned: bool) -> Fault | None:
    """What a request meets.

    Args:
        is_planned: The plan is stored; before, asking for it brings an error text no digest protects.
    """
    for kind, rate in draw.rates.items():
        if chosen.random() < rate and _suits(kind, request, is_planned):
            return _fault(kind, request, chosen)
    return None


def _fault(kind: Kind, request: Request, chosen: random.Random) -> Fault:
    if kind == "throttle":
        status, code = chosen.choice(_THROTTLES)
        return Fault(kind=kind, status=status, code=code)
    if kind == "delay":
        return Fault(kind=kind, seconds=chosen.uniform(0.01, 0.2))
    if kind == "slow_response":
        return Fault(kind=kind, seconds=0.0005)
    if kind.endswith("_request"):
        return Fault(kind=kind, at=chosen.randrange(request.body_bytes))
    # Most answers are small, some are megabytes.
    return Fault(kind=kind, at=int(2 ** chosen.uniform(0, 14)) - 1)


def _suits(kind: Kind, request: Request, is_planned: bool) -> bool:
    path = request.path
    if kind == "cut_request":
        return request.body_bytes > 0
    if kind == "corrupt_request":
        return request.method == "PUT" and request.body_bytes > 0
    if kind == "slow_response":
        return path.endswith(("lease.json", "config.json")) or "/done/" in path
    if kind == "corrupt_response":
        return request.method == "GET" and _is_digested(request, is_planned)
    return True


def _is_digested(request: Request, is_planned: bool) -> bool:
    """Whole objects have an etag, cells of activations a recorded digest; listings and ranges have none."""
    path = request.path
    if "list-type" in request.query or "uploads" in request.query or path.endswith(".jsonl"):
        return False
    if path.endswith("/plan.json"):
        return is_planned
    return "/activations/" in path or not path.endswith(".safetensors")
