"""The pieces of a block's solve: input groups that are one row tile, tiles of others, and packing these."""

from collections.abc import Sequence
from dataclasses import dataclass

from quantlib.job.schedule import Piece, PieceId, Setup, Worker
from quantlib.job.shares import share_by_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWork:
    """What is left to do of an input group.

    Attributes:
        output: Of which output.
        group: Its number.
        tiles: Numbers of the tiles that are not solved yet.
        is_cut: Whether it has several in all, which are packed in a piece of its own.
        prepare_cost: What comes before the first tile that a worker solves.
        tile_cost: Of a tile, on average.
    """

    output: int = 0
    group: int
    tiles: tuple[int, ...]
    is_cut: bool
    prepare_cost: float
    tile_cost: float


def solve_pieces(block: int, works: Sequence[GroupWork], workers: Sequence[Worker]) -> list[Piece]:
    """Pieces of several groups of a block, each at home with some worker.

    A group has one home, and more of them, which prepare for themselves, only where all groups end sooner so.
    """
    homes = _homes(works, workers)
    pieces: list[Piece] = []
    for work in works:
        # All of one cost, though the last tile of a linear may be smaller: a worker ends one group before the
        # next. Whoever solves a whole group keeps nothing of it.
        setup = Setup(name=(block, work.output, work.group), cost=work.prepare_cost if work.is_cut else 0.0)
        cost = work.tile_cost if work.is_cut else work.prepare_cost + work.tile_cost
        tiles = [
            Piece(
                id=PieceId(block, "solve", tile, work.output),
                rank=block,
                cost=cost,
                home=homes[work.output, tile],
                setup=setup,
            )
            for tile in work.tiles
        ]
        pieces += tiles
        if work.is_cut:
            pieces.append(_packing(block, work, tiles, workers[0]))
    return pieces


def _packing(block: int, work: GroupWork, tiles: Sequence[Piece], otherwise: Worker) -> Piece:
    return Piece(
        id=PieceId(block, "pack", work.group, work.output),
        rank=block,
        # That of a tile, so that codes do not wait for the tiles of other groups.
        cost=work.tile_cost,
        home=tiles[0].home if tiles else otherwise,
        after=frozenset(tile.id for tile in tiles),
    )


def _homes(works: Sequence[GroupWork], workers: Sequence[Worker]) -> dict[tuple[int, int], Worker]:
    """(output, tile) -> worker."""
    costs = [work.prepare_cost + work.tile_cost * len(work.tiles) for work in works]
    loads = [
        _Load(worker, {work: list(work.tiles) for work in (works[index] for index in share) if work.tiles})
        for worker, share in zip(workers, share_by_cost(costs, len(workers)), strict=True)
    ]
    while (move := _best_move(loads)) is not None:
        giver, taker, work = move
        taker.tiles.setdefault(work, []).append(giver.tiles[work].pop())
        if not giver.tiles[work]:
            del giver.tiles[work]
    return {
        (work.output, tile): load.worker
        for load in loads
        for work, tiles in load.tiles.items()
        for tile in tiles
    }


@dataclass(slots=True)
class _Load:
    """What a worker is to do: tiles by their group."""

    worker: Worker
    tiles: dict[GroupWork, list[int]]

    @property
    def cost(self) -> float:
        """With one preparation a group."""
        return sum(work.prepare_cost + work.tile_cost * len(tiles) for work, tiles in self.tiles.items())

    def cost_with(self, work: GroupWork) -> float:
        """With a tile more."""
        return self.cost + work.tile_cost + work.prepare_cost * (work not in self.tiles)


def _best_move(loads: Sequence[_Load]) -> tuple[_Load, _Load, GroupWork] | None:
    """A tile of whoever has most for whoever would then end first, if that is sooner."""
    giver = max(loads, key=lambda load: load.cost)
    moves = [(taker.cost_with(work), taker, work) for work in giver.tiles for taker in loads]
    cost, taker, work = min(moves, key=lambda move: move[0], default=(0.0, giver, None))
    return (giver, taker, work) if work is not None and cost < giver.cost else None
