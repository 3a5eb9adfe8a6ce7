"""A solver that goes on where the memory of its device does not suffice: less at a time, on the CPU at last.

Plans leave room for every solve, so this is for what no plan knows: others on the same device, memory in
pieces, workspaces of libraries. A step that was taken is told of every linear that it concerns.

Rows know nothing of each other, so that smaller tiles are the same problem. On a CPU they give the same
codes. On a GPU products of other shapes may be summed in another order, and a target in the middle between
two levels may then get the other code; what a CPU makes of a factor differs in last bits too. So bytes repeat
from run to run where no step after `EMPTIED_CACHE` was taken.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from quantlib.group_solver import GroupSolver, Statistics, Tensors, TileRows
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.group_tiles import GroupTile
from quantlib.job.plan import BlockPlan
from quantlib.methods import METHODS
from quantlib.methods.contracts import EMPTIED_CACHE, ON_CPU, SMALLER_TILES, deepest_step
from quantlib.methods.whole_solve import Method, joined_parts
from quantlib.packing.contracts import PackingFormat
from quantlib.row_tiles import cut_tile, tile_height
from quantlib.solver_settings import SolverSettings

T = TypeVar("T")
# What the driver, Triton, cuBLAS and cuSOLVER say, for whom PyTorch's allocator keeps too much.
_SHORTAGES = ("out of memory", "STATUS_ALLOC_FAILED")
# Packed tensors by name, and rows of the report.
Packed = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Rung:
    """A way to solve that takes less memory than the one before.

    Attributes:
        step: What reports call it.
        pieces: How many times fewer rows a tile has.
        on_cpu: Whether the device is left alone.
    """

    step: str | None
    pieces: int = 1
    on_cpu: bool = False


_PLAIN, _AGAIN, _LAST = Rung(None), Rung(EMPTIED_CACHE), Rung(ON_CPU, on_cpu=True)
RUNGS = (_PLAIN, _AGAIN, *(Rung(SMALLER_TILES, pieces) for pieces in (2, 4, 8)), _LAST)


def descend(attempt: Callable[[Rung], T], rungs: Sequence[Rung]) -> tuple[T, Rung]:
    """Attempt the same on one rung after the other until memory suffices; on the last whatever comes of it.

    Returns:
        What the attempt gave, and its rung.
    """
    for rung in rungs[:-1]:
        found = _unless_out_of_memory(attempt, rung)
        if found is not None:
            return found[0], rung
        torch.cuda.empty_cache()
    return attempt(rungs[-1]), rungs[-1]


def _unless_out_of_memory(attempt: Callable[[Rung], T], rung: Rung) -> tuple[T] | None:
    # Whoever catches the error holds all that the attempt had made; it is free once this has returned.
    try:
        return (attempt(rung),)
    except RuntimeError as error:
        is_short = any(words in str(error) for words in _SHORTAGES)
        if not (is_short or isinstance(error, torch.OutOfMemoryError)):
            raise
        return None


class MemoryLadder:
    """Quantizes and packs input groups as a `GroupSolver` does, whose arguments and results these are.

    Args:
        methods: Name -> method, on the device.
    """

    def __init__(
        self,
        packer: PackingFormat,
        settings: SolverSettings,
        device: torch.device,
        height: int | None = None,
        methods: Mapping[str, Method] = METHODS,
    ) -> None:
        self._packer, self._settings, self._device = packer, settings, device
        self._height, self._methods = height, methods
        self._plain = self._solver(height)
        self._on_cpu = GroupSolver(packer, settings, torch.device("cpu"), height)
        # (block, group) -> the rungs that are left to its tiles: none shall fail as the one before did.
        self._left: dict[tuple[int, int], Sequence[Rung]] = {}

    def tiles(self, block: BlockPlan) -> dict[int, list[GroupTile]]:
        """Input group -> its tiles."""
        return self._plain.tiles(block)

    def solve(
        self, block: BlockPlan, group: int, tensors: Tensors, statistics: Statistics, tokens: GroupTokens
    ) -> Packed:
        """Quantize and pack the linears of one group."""

        def attempt(rung: Rung) -> Packed:
            solver = self._on_cpu if rung.on_cpu else self._with_lower_tiles(block, group, rung.pieces)
            try:
                return solver.solve(block, group, tensors, statistics, tokens)
            finally:
                solver.forget()

        return _told(*descend(attempt, RUNGS))

    def solve_batch(
        self,
        block: BlockPlan,
        groups: Sequence[int],
        tensors: Tensors,
        statistics: Sequence[Statistics],
        tokens: Sequence[GroupTokens],
    ) -> list[Packed]:
        """Quantize and pack groups that are alike as one batch; where that takes too much, one by one."""

        def one_by_one() -> list[Packed]:
            return [
                self.solve(block, group, tensors, sums, behind)
                for group, sums, behind in zip(groups, statistics, tokens, strict=True)
            ]

        def attempt(rung: Rung) -> list[Packed]:
            if rung.pieces > 1:
                return one_by_one()
            return self._plain.solve_batch(block, groups, tensors, statistics, tokens)

        if len(groups) == 1:
            return one_by_one()
        found, rung = descend(attempt, RUNGS[:3])
        return [_told(made, rung) for made in found]

    def solve_tile(
        self,
        block: BlockPlan,
        tile: GroupTile,
        tensors: Tensors,
        statistics: Statistics,
        tokens: GroupTokens,
    ) -> TileRows:
        """Quantize a tile of a group that has several."""

        def attempt(rung: Rung) -> TileRows:
            given = (tensors, statistics, tokens)
            if rung.on_cpu:
                self._plain.forget()
                return self._on_cpu.solve_tile(block, tile, *given)
            cut = [dataclasses.replace(tile, runs=runs) for runs in cut_tile(tile.runs, rung.pieces)]
            parts = [self._plain.solve_tile(block, piece, *given) for piece in cut]
            return {
                run.name: joined_parts([part[run.name] for part in parts if run.name in part])
                for run in tile.runs
            }

        place = (block.index, tile.group)
        found, rung = descend(attempt, self._left.get(place, RUNGS))
        if rung not in (_PLAIN, _AGAIN):
            self._left[place] = RUNGS[RUNGS.index(rung) :]
        return {
            name: dataclasses.replace(rows, memory_step=deepest_step([rows.memory_step, rung.step]))
            for name, rows in found.items()
        }

    def pack(self, block: BlockPlan, group: int, solved: Sequence[TileRows], tokens: GroupTokens) -> Packed:
        """Pack the linears of a group from all its tiles, in order."""

        def attempt(rung: Rung) -> Packed:
            solver = self._on_cpu if rung.on_cpu else self._plain
            return solver.pack(block, group, solved, tokens)

        return _told(*descend(attempt, (_PLAIN, _AGAIN, _LAST)))

    def forget(self) -> None:
        """Let go of what was prepared."""
        self._plain.forget()
        self._on_cpu.forget()

    def _with_lower_tiles(self, block: BlockPlan, group: int, pieces: int) -> GroupSolver:
        if pieces == 1:
            return self._plain
        linears = [linear for linear in block.linears if linear.name in block.input_groups[group]]
        height = self._height or tile_height(linears[0].columns, self._device.type)
        highest = min(height, sum(linear.rows for linear in linears))
        return self._solver(math.ceil(highest / pieces))

    def _solver(self, height: int | None) -> GroupSolver:
        return GroupSolver(self._packer, self._settings, self._device, height, self._methods)


def _told(made: Packed, rung: Rung) -> Packed:
    packed, rows = made
    return packed, [{**row, "memory_step": deepest_step([row["memory_step"], rung.step])} for row in rows]
