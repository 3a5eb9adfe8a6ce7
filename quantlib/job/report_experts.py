"""What a report says of routed experts: how many tokens they were calibrated with, and how others count."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.job.report_figures import count, is_number

# Experts of a block by rank: name -> share of them that have fewer tokens.
_RANKS = {"fewest tokens": 0.0, "one in ten has fewer": 0.1, "half have fewer": 0.5, "most tokens": 1.0}


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One expert of a block.

    Attributes:
        tokens: That it was routed.
        shared: How many tokens those of other experts count for.
    """

    tokens: int
    shared: float


def loads_of(report: Mapping[str, Any]) -> list[list[ExpertLoad]]:
    """The experts of every block, by falling need; empty for a block without any."""
    found = []
    for block in report.get("blocks") or ():
        experts: dict[str, ExpertLoad] = {}
        for linear in block.get("linears") or ():
            if is_number(linear.get("shared_tokens")):
                load = ExpertLoad(linear["tokens"], linear["shared_tokens"])
                expert, _, _ = str(linear["name"]).rpartition(".")
                experts[expert] = max(load, experts.get(expert, load), key=lambda found: found.shared)
        found.append(sorted(experts.values(), key=lambda load: load.tokens))
    return found


def tokens_by_rank(report: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Rank among the experts of a block -> tokens, one value a block; empty without routed experts."""
    loads = loads_of(report)
    if not any(loads):
        return {}
    return {
        name: [
            float(experts[round(share * (len(experts) - 1))].tokens) if experts else None for experts in loads
        ]
        for name, share in _RANKS.items()
    }


def sentence(report: Mapping[str, Any]) -> str | None:
    """How the experts were treated; None without routed experts."""
    every = [load for experts in loads_of(report) for load in experts]
    if not every:
        return None
    few = sum(load.tokens < load.shared for load in every)
    none = sum(load.tokens == 0 for load in every)
    return (
        f"Of {count(len(every))} experts {count(few)} were routed fewer tokens than those of other experts"
        f" count for in their Hessians, {count(none)} of them none; the fewest"
        f" {count(min(x.tokens for x in every))}, the most {count(max(x.tokens for x in every))}."
    )
