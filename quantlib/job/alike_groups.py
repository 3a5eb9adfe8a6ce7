"""Input groups of a block that may be solved as one batch: the experts of a layer, mostly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantlib.job.group_tiles import GroupTile
from quantlib.job.plan import BlockPlan, Groups
from quantlib.row_tiles import batch_size, tile_rows
from quantlib.schemes import WeightScheme


@dataclass(frozen=True, slots=True)
class Likeness:
    """What the groups of a batch have in common.

    Attributes:
        method: Of all linears.
        scheme: Of all linears.
        rows: Of each linear, in the order of a group.
        columns: In features.
        most: How many groups make a batch at most.
    """

    method: str | None
    scheme: WeightScheme | None
    rows: tuple[int, ...]
    columns: int
    most: int


def likenesses(
    block: BlockPlan, tiles: Mapping[int, Sequence[GroupTile]], device_type: str
) -> dict[int, Likeness]:
    """Input group -> what it must share with others of its batch; groups that are always alone are left out.

    Alone are groups of several tiles, of which a worker solves one at a time, groups with biases that are
    corrected, and large ones.

    Args:
        tiles: Input group -> its row tiles.
        device_type: ``cpu`` or ``cuda``.
    """
    linears = {linear.name: linear for linear in block.linears}
    found: dict[int, Likeness] = {}
    for group, own in tiles.items():
        if len(own) > 1 or group in block.centered_groups:
            continue
        runs, first = own[0].runs, linears[own[0].runs[0].name]
        most = batch_size(tile_rows(runs), first.columns, device_type)
        if most > 1:
            rows = tuple(run.rows for run in runs)
            found[group] = Likeness(first.method, first.scheme, rows, first.columns, most)
    return found


def even_batches(groups: Sequence[int], most: int) -> list[Groups]:
    """As few batches as hold all groups (at least one), of sizes that differ by one at most.

    >>> even_batches([3, 5, 8, 9, 12], 4)
    [(3, 5), (8, 9, 12)]
    """
    count = -(-len(groups) // most)
    ends = [len(groups) * number // count for number in range(count + 1)]
    return [tuple(groups[start:end]) for start, end in pairwise(ends)]
