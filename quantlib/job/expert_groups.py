"""Where the inputs of a block's linears are seen, and what stands in for tokens that an expert lacks.

An expert sees the tokens that the router sends it, perhaps few or none. Its Hessian is therefore shrunk
towards that of all tokens, H <- (n H_own + k H_all) / (n + k): n tokens of its own, k by the number of input
features. What an expert's first linears read is known of every token; their H_all is summed once for all
experts, in a *pool*. What its down projection reads is not: evenly spaced tokens are run through the expert
besides its own, with so little weight that together they count as k.

With ``calibration_routing`` all-experts every linear sees all tokens: the first linears of all experts are
one input group, and nothing is shrunk.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlib.job.options import ROUTED
from quantlib.job.plan import BlockPlan, LinearPlan, Plan
from quantlib.readers import Reader

_LAST_LINEAR = "down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTokens:
    """Calibration tokens behind the sums of an input group.

    Attributes:
        own: Those that its linears were given in the model.
        shared: How many tokens those count for that stand in for more of them; None outside routed experts.
        pool: Tokens summed for all experts, which count as ``shared`` together; 0 where they are in the
            group's own sums already.
        dropped: Tokens that were to stand in and were not finite in this expert.
        outlier_columns: Columns of the input that held an outlier in any of its own; None without tokens.
    """

    own: int
    shared: float | None = None
    pool: int = 0
    dropped: int = 0
    outlier_columns: int | None = None

    @property
    def total(self) -> int:
        """Tokens that the Hessian is of."""
        return self.own if self.shared is None else round(self.own + self.shared)

    @property
    def shared_share(self) -> float:
        """What a token of the pool counts for."""
        return (self.shared or 0.0) / max(1, self.pool)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """What observing the cells of a block counted.

    Attributes:
        all: Tokens that went through the block.
        routed: Reader inside experts -> tokens that it was given.
        dropped: The same -> tokens that it was given besides and that were not finite.
        outliers: Reader -> columns that held an outlier, in whichever cell.
    """

    all: int = 0
    routed: Mapping[int, int] = field(default_factory=dict)
    dropped: Mapping[int, int] = field(default_factory=dict)
    outliers: Mapping[int, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def over(cls, cells: Iterable[Mapping[str, Any]]) -> "TokenCounts":
        """What was told of cells, together; see `quantlib.block_statistics.BlockStatistics.observe`."""
        tokens, routed, dropped = 0, Counter[int](), Counter[int]()
        outliers: dict[int, frozenset[int]] = {}
        for told in cells:
            tokens += told["tokens"]
            routed.update(told["routed"])
            dropped.update(told["dropped"])
            for number, columns in told["outliers"].items():
                outliers[number] = outliers.get(number, frozenset()).union(columns)
        return cls(all=tokens, routed=dict(routed), dropped=dict(dropped), outliers=outliers)


def merged_groups(
    groups: Sequence[tuple[str, ...]], linears: Mapping[str, LinearPlan]
) -> list[tuple[str, ...]]:
    """Input groups where all experts see all tokens: the first linears of all experts read one tensor."""
    merged: dict[Any, tuple[str, ...]] = {}
    for place, names in enumerate(groups):
        first = linears[names[0]]
        key = first.experts if first.experts is not None and _reads_input(first) else place
        merged[key] = merged.get(key, ()) + names
    return list(merged.values())


@dataclass(frozen=True, slots=True)
class BlockReaders:
    """Where a block's inputs are seen.

    Attributes:
        readers: Of every input group by its number; behind them, of pools.
        pools: Input group -> number of the pool that its Hessian is shrunk towards, for those that have one.
    """

    readers: Mapping[int, Reader]
    pools: Mapping[int, int]


def readers_of(plan: Plan, block: BlockPlan) -> BlockReaders:
    """Where the inputs of a block's groups are seen, and those that stand in for them."""
    leaders = _leaders(block)
    readers = {number: _reader(plan, leader) for number, leader in enumerate(leaders)}
    pools: dict[int, int] = {}
    if plan.options["calibration_routing"] == ROUTED and plan.options["expert_shrinkage"]:
        numbers: dict[str | None, int] = {}
        for group, leader in enumerate(leaders):
            if leader.experts is not None and _reads_input(leader):
                pools[group] = numbers.setdefault(leader.experts, len(leaders) + len(numbers))
                path = f"{leader.experts}.inputs"
                readers[pools[group]] = Reader(name=leader.name, path=path, experts=leader.experts)
    return BlockReaders(readers, pools)


def group_tokens(plan: Plan, block: BlockPlan, counts: TokenCounts) -> dict[int, GroupTokens]:
    """The tokens behind every input group."""
    is_routed = plan.options["calibration_routing"] == ROUTED
    pools, found = readers_of(plan, block).pools, {}
    for number, leader in enumerate(_leaders(block)):
        columns = counts.outliers.get(number)
        num_outliers = None if columns is None else len(columns)
        if leader.experts is None or not is_routed or not counts.all:
            own = counts.routed.get(number, counts.all)
            found[number] = GroupTokens(own=own, outlier_columns=num_outliers)
        else:
            found[number] = GroupTokens(
                own=counts.routed.get(number, 0),
                shared=_shared_tokens(plan, leader.columns),
                pool=counts.routed.get(pools[number], 0) if number in pools else 0,
                dropped=counts.dropped.get(number, 0),
                outlier_columns=num_outliers,
            )
    return found


def token_shares(plan: Plan, block: BlockPlan) -> dict[str, float]:
    """Linear -> the share of the tokens that go through it, on average."""
    experts = Counter(x.experts for x in block.linears if not _reads_input(x))
    return {
        linear.name: 1.0
        if linear.experts is None
        else min(1.0, plan.experts_per_token / max(1, experts[linear.experts]))
        for linear in block.linears
    }


def _leaders(block: BlockPlan) -> list[LinearPlan]:
    """A linear of every input group."""
    linears = {linear.name: linear for linear in block.linears}
    return [linears[names[0]] for names in block.input_groups]


def _reader(plan: Plan, leader: LinearPlan) -> Reader:
    if leader.experts is None:
        return Reader(name=leader.name, path=leader.path)
    is_routed = plan.options["calibration_routing"] == ROUTED
    if _reads_input(leader):
        path = leader.path if is_routed else f"{leader.experts}.inputs"
        return Reader(name=leader.name, path=path, experts=leader.experts)
    reader = Reader(name=leader.name, path=leader.path, experts=leader.experts)
    if not is_routed:
        return dataclasses.replace(reader, counts_own=False, extra_share=1.0)
    tokens = plan.options["sequences"] * plan.options["sequence_length"]
    return dataclasses.replace(reader, extra_share=_shared_tokens(plan, leader.columns) / tokens)


def _shared_tokens(plan: Plan, columns: int) -> float:
    return plan.options["expert_shrinkage"] * columns / 100


def _reads_input(linear: LinearPlan) -> bool:
    """Whether a linear of an expert reads what the experts are given; see `quantlib.model.experts.Expert`."""
    return linear.path.rpartition(".")[2] != _LAST_LINEAR
