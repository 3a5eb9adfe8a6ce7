"""The solve of a block for one output, or several that have its codes.

What is left of it, how workers are asked, what is kept of answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quantlib.job.alike_groups import Likeness, likenesses
from quantlib.job.block_parts import BlockParts
from quantlib.job.bundle import Bundle
from quantlib.job.expert_groups import GroupTokens, TokenCounts, group_tokens
from quantlib.job.group_tiles import group_tiles
from quantlib.job.holdings import Held, Holdings
from quantlib.job.plan import Groups
from quantlib.job.schedule import PieceId
from quantlib.job.solve_pieces import GroupWork
from quantlib.row_tiles import device_type_of, tile_rows


class OutputSolve:
    """What is to be solved of a block for one output.

    Args:
        output: Which one.
        others: Outputs that have the same codes and are packed along with it.
        groups: Shared input groups that are to be solved now.
        statistics: Shared input group -> what `quantlib.block_runner.BlockRunner.solve` takes of sums.
        counts: Tokens behind the sums.
    """

    def __init__(
        self,
        bundle: Bundle,
        holdings: Holdings,
        parts: BlockParts,
        output: int,
        others: Sequence[int],
        block: int,
        groups: Groups,
        statistics: Mapping[int, Sequence[Any]],
        counts: TokenCounts,
    ) -> None:
        self._parts, self._output, self._others, self._block = parts, output, list(others), block
        held, plan, shared = holdings.outputs[output], bundle.outputs[output], bundle.shared
        self._plan, self._sums = plan.blocks[block], bundle.sums[output][block]
        self._packed = {
            number: holdings.outputs[number].packed.setdefault(block, {}) for number in (output, *others)
        }
        self._solved = held.solved.setdefault(block, {})
        self._device_type = device_type_of(plan.device_kind)
        self._tiles_of = group_tiles(self._plan, self._device_type)
        unsolved = (parts.unsolved(number, block, groups) for number in self._packed)
        self._mine = sorted({group for missing in unsolved for group in missing})
        self._tiles = {tile.number: tile for group in self._mine for tile in self._tiles_of[group]}
        # By itself an output that calibrates nothing here would have no sums.
        has_sums = self._plan.is_calibrated
        self._statistics = statistics if has_sums else {}
        self._tokens = group_tokens(shared, shared.blocks[block], counts if has_sums else TokenCounts())

    def works(self, *, has_batches: bool) -> list[GroupWork]:
        """What is left of its input groups; costs in multiply-adds.

        Args:
            has_batches: Whether groups that are alike are solved as one batch.
        """
        alike = likenesses(self._plan, self._tiles_of, self._device_type) if has_batches else {}
        return [self._work(group, alike.get(group)) for group in self._mine]

    def call(self, piece: PieceId, groups: Groups | None) -> tuple[Any, ...]:
        """Method and arguments for whoever does a piece.

        Args:
            groups: Of a piece ``solve`` of whole groups, their numbers.
        """
        place = (self._block, self._output)
        if piece.stage == "pack":
            codes = [self._solved[tile.number].handle for tile in self._tiles_of[piece.part]]
            return "pack", *place, piece.part, codes, self._tokens_of(piece.part), self._others
        sources = self._parts.sources(self._block)
        if groups is None:
            tile = self._tiles[piece.part]
            given, tokens = self._statistics_of(tile.group), self._tokens_of(tile.group)
            return "solve_tile", *place, tile, sources, given, tokens
        given, tokens = map(self._statistics_of, groups), map(self._tokens_of, groups)
        return "solve", *place, groups, sources, list(given), list(tokens), self._others

    def heard(self, worker: int, piece: PieceId, groups: Groups | None, result: Any) -> None:
        """A worker has done a piece; arguments as for `call`."""
        if "rows" in result:
            self._solved[piece.part] = Held(worker, result["rows"])
            return
        done, made = ((piece.part,), [result]) if groups is None else (groups, result["groups"])
        for group, found in zip(done, made, strict=True):
            for packed, handle in zip(self._packed.values(), found["packed"], strict=True):
                packed[group] = Held(worker, handle, found["linears"])
            for tile in self._tiles_of[group]:
                self._solved.pop(tile.number, None)

    def report_rows(self) -> dict[int, list[dict[str, Any]]]:
        """Output -> rows of all its linears that are quantized by now, in the plan's order."""
        rows = {row["name"]: row for group in self._packed[self._output].values() for row in group.told}
        found = [rows[linear.name] for linear in self._plan.linears if linear.name in rows]
        return dict.fromkeys(self._packed, found)

    def _statistics_of(self, group: int) -> Sequence[Any]:
        return self._statistics.get(self._sums[group], [[], [], []])

    def _tokens_of(self, group: int) -> GroupTokens:
        return self._tokens[self._sums[group]]

    def _work(self, group: int, likeness: Likeness | None) -> GroupWork:
        tiles = self._tiles_of[group]
        (columns,) = {x.columns for x in self._plan.linears if x.name == tiles[0].runs[0].name}
        rows = sum(tile_rows(tile.runs) for tile in tiles)
        return GroupWork(
            output=self._output,
            group=group,
            tiles=tuple(tile.number for tile in tiles if tile.number not in self._solved),
            is_cut=len(tiles) > 1,
            prepare_cost=columns**3 / 3,
            tile_cost=rows * columns**2 / len(tiles),
            likeness=likeness,
        )
