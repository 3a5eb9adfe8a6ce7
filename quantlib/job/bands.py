"""The pieces in which statistics go from worker to worker, from shapes alone.

A *band* is a run of neighbouring panels of one sum. Small sums are one band; of a large one every panel is,
so that several workers can add it up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantlib.job.expert_groups import readers_of
from quantlib.job.plan import Groups, Plan
from quantlib.panels import panels_of

# So few observers' sums are added by whoever solves: to add them before would only move them once more.
MAX_DIRECT_BATCHES = 2
_ENTRY_BYTES = 8
# A sum beyond this part of what a worker is to add is cut: no worker gets more than its share and this.
_CUT_BEYOND_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class SumShape:
    """Of the sum of an input group, or of a pool of experts' tokens.

    Attributes:
        columns: Rows, and columns.
        is_whole: Both triangles count, of X_ref^T X; otherwise the lower one only, of X^T X.
        reader: Where X is seen; see `quantlib.job.expert_groups.readers_of`.
    """

    columns: int
    is_whole: bool
    reader: int = 0

    def panel_bytes(self) -> list[int]:
        """Of the panels, from top to bottom."""
        return [
            _ENTRY_BYTES * (end - start) * (self.columns if self.is_whole else end)
            for start, end in panels_of(self.columns)
        ]


@dataclass(frozen=True, slots=True)
class Band:
    """Neighbouring panels of one sum.

    Attributes:
        total: Which sum, as `sum_shapes` orders them.
        first: Its first panel.
        end: The panel behind its last.
        size_bytes: Of the panels.
    """

    total: int
    first: int
    end: int
    size_bytes: int


def sum_shapes(plan: Plan, block: int, groups: Groups) -> list[SumShape]:
    """Of X^T X of every input group, then of the pools they need, then X_ref^T X where targets are corrected.

    With a row and a column more where a group's biases are (`quantlib.calibration.moments`). Experts' targets
    are not corrected: the tokens they are routed are others in the reference stream.
    """
    planned = plan.blocks[block]
    linears = {linear.name: linear for linear in planned.linears}
    leaders = {group: linears[planned.input_groups[group][0]] for group in groups}
    sizes = {group: leader.columns + (group in planned.centered_groups) for group, leader in leaders.items()}
    sums = [SumShape(size, False, group) for group, size in sizes.items()]
    pools = readers_of(plan, planned).pools
    needed = {pools[group]: size for group, size in sizes.items() if group in pools}
    sums += [SumShape(size, False, pool) for pool, size in needed.items()]
    if plan.options["correct_targets"]:
        sums += [
            SumShape(size, True, group) for group, size in sizes.items() if leaders[group].experts is None
        ]
    return sums


def cut_into_bands(shapes: Sequence[SumShape], num_workers: int) -> list[Band]:
    """Bands of all sums, in order, fine enough for so many workers to add up about as many bytes each.

    >>> [(band.first, band.end) for band in cut_into_bands([SumShape(200, False)], 1)]
    [(0, 2)]
    >>> [(band.first, band.end) for band in cut_into_bands([SumShape(200, False)], 2)]
    [(0, 1), (1, 2)]
    """
    panels = [shape.panel_bytes() for shape in shapes]
    most = sum(map(sum, panels))
    if num_workers > 1:
        most *= _CUT_BEYOND_SHARE / num_workers
    return [band for total, sizes in enumerate(panels) for band in _bands(total, sizes, most)]


def rails_of(nodes: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """Workers in the same place of every node, as many times as every node has one.

    >>> rails_of({"a": [0, 3], "b": [1, 2, 4]})
    [[0, 1], [3, 2]]
    """
    return [list(rail) for rail in zip(*nodes.values(), strict=False)]


def _bands(total: int, sizes: Sequence[int], most: float) -> Iterator[Band]:
    if sum(sizes) <= most:
        yield Band(total, 0, len(sizes), sum(sizes))
        return
    for panel, size in enumerate(sizes):
        yield Band(total, panel, panel + 1, size)
