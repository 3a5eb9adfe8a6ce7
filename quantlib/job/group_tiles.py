"""The row tiles of a block's input groups: pieces of a solve that any worker can do."""

from collections.abc import Iterator
from dataclasses import dataclass

from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.row_tiles import RowRun, Tile, row_tiles, tile_height


@dataclass(frozen=True, slots=True)
class GroupTile:
    """A row tile of an input group.

    Attributes:
        number: Within the block.
        group: Number of the input group.
        runs: Rows of linears that share method and scheme; or all linears of a group that is not cut.
    """

    number: int
    group: int
    runs: Tile


def group_tiles(block: BlockPlan, device_type: str, height: int | None = None) -> dict[int, list[GroupTile]]:
    """Input group -> its tiles.

    A group with biases that are corrected is one tile: which codes suit a bias is known once all its rows are
    solved.

    Args:
        device_type: ``cpu`` or ``cuda``.
        height: Most rows of a tile; by default from the columns.
    """
    linears = {linear.name: linear for linear in block.linears}
    found: dict[int, list[GroupTile]] = {}
    number = 0
    for group, names in enumerate(block.input_groups):
        members = [linears[name] for name in names]
        if group in block.centered_groups:
            tiles: list[Tile] = [tuple(RowRun(linear.name, 0, linear.rows) for linear in members)]
        else:
            most = height or tile_height(members[0].columns, device_type)
            tiles = [tile for alike in _alike(members) for tile in row_tiles(alike, most)]
        found[group] = [GroupTile(number + place, group, runs) for place, runs in enumerate(tiles)]
        number += len(tiles)
    return found


def _alike(linears: list[LinearPlan]) -> Iterator[dict[str, int]]:
    """Rows of the linears of one method and scheme, each time."""
    kinds: dict[tuple, dict[str, int]] = {}
    for linear in linears:
        kinds.setdefault((linear.method, linear.scheme), {})[linear.name] = linear.rows
    yield from kinds.values()
