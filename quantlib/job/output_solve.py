"""The solve of a block for one output: what is left of it, how workers are asked, what is kept of answers."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from quantlib.job.block_parts import BlockParts
from quantlib.job.bundle import Bundle
from quantlib.job.expert_groups import GroupTokens, TokenCounts, group_tokens
from quantlib.job.group_tiles import GroupTile, group_tiles
from quantlib.job.holdings import Held, Holdings
from quantlib.job.plan import BlockPlan, Groups
from quantlib.job.schedule import PieceId
from quantlib.job.solve_pieces import GroupWork
from quantlib.row_tiles import device_type_of, tile_rows


class OutputSolve:
    """What is to be solved of a block for one output.

    Args:
        output: Which one.
        groups: Shared input groups that are to be solved now.
        statistics: Shared input group -> what `quantlib.block_runner.BlockRunner.solve` takes of sums.
        counts: Tokens behind the sums.

    Attributes:
        works: What is left of its input groups.
    """

    def __init__(
        self,
        bundle: Bundle,
        holdings: Holdings,
        parts: BlockParts,
        output: int,
        block: int,
        groups: Groups,
        statistics: Mapping[int, Sequence[Any]],
        counts: TokenCounts,
    ) -> None:
        self._parts, self._output, self._block = parts, output, block
        held, plan, shared = holdings.outputs[output], bundle.outputs[output], bundle.shared
        self._plan, self._sums = plan.blocks[block], bundle.sums[output][block]
        self._packed = held.packed.setdefault(block, {})
        self._solved = held.solved.setdefault(block, {})
        self._tiles_of = group_tiles(self._plan, device_type_of(plan.device_kind))
        mine = parts.unsolved(output, block, groups)
        self._tiles = {tile.number: tile for group in mine for tile in self._tiles_of[group]}
        # By itself an output that calibrates nothing here would have no sums.
        has_sums = self._plan.is_calibrated
        self._statistics = statistics if has_sums else {}
        self._tokens = group_tokens(shared, shared.blocks[block], counts if has_sums else TokenCounts())
        self.works = [_group_work(output, self._plan, self._tiles_of[group], self._solved) for group in mine]

    def call(self, piece: PieceId) -> tuple[Any, ...]:
        """Method and arguments for whoever does a piece."""
        if piece.stage == "pack":
            codes = [self._solved[tile.number].handle for tile in self._tiles_of[piece.part]]
            return "pack", self._block, self._output, piece.part, codes, self._tokens_of(piece.part)
        tile = self._tiles[piece.part]
        is_whole = len(self._tiles_of[tile.group]) == 1
        method, part = ("solve", tile.group) if is_whole else ("solve_tile", tile)
        given, sources = self._statistics.get(self._sums[tile.group]), self._parts.sources(self._block)
        tokens = self._tokens_of(tile.group)
        return method, self._block, self._output, part, sources, given or [[], [], []], tokens

    def heard(self, worker: int, piece: PieceId, result: Any) -> None:
        """A worker has done a piece."""
        if "rows" in result:
            self._solved[piece.part] = Held(worker, result["rows"])
            return
        group = piece.part if piece.stage == "pack" else self._tiles[piece.part].group
        self._packed[group] = Held(worker, result["packed"], result["linears"])
        for tile in self._tiles_of[group]:
            self._solved.pop(tile.number, None)

    def report_rows(self) -> list[dict[str, Any]]:
        """Of all linears that are quantized by now, in the plan's order."""
        rows = {row["name"]: row for group in self._packed.values() for row in group.told}
        return [rows[linear.name] for linear in self._plan.linears if linear.name in rows]

    def _tokens_of(self, group: int) -> GroupTokens:
        return self._tokens[self._sums[group]]


def _group_work(
    output: int, block: BlockPlan, tiles: Sequence[GroupTile], solved: Container[int]
) -> GroupWork:
    """What is left of an input group; costs in multiply-adds."""
    (columns,) = {linear.columns for linear in block.linears if linear.name == tiles[0].runs[0].name}
    rows = sum(tile_rows(tile.runs) for tile in tiles)
    return GroupWork(
        output=output,
        group=tiles[0].group,
        tiles=tuple(tile.number for tile in tiles if tile.number not in solved),
        is_cut=len(tiles) > 1,
        prepare_cost=columns**3 / 3,
        tile_cost=rows * columns**2 / len(tiles),
    )
