"""The pieces of a block's solve: input groups that are one row tile, tiles of others, and packing these.

Small groups that are alike are a piece together, once it is settled which worker has them: workers share
groups as evenly as if there were no batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantlib.job.alike_groups import Likeness, even_batches
from quantlib.job.plan import Groups
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
        likeness: What it must share with others to be solved as one batch; None if it is solved alone.
    """

    output: int = 0
    group: int
    tiles: tuple[int, ...]
    is_cut: bool
    prepare_cost: float
    tile_cost: float
    likeness: Likeness | None = None


@dataclass(frozen=True, slots=True)
class SolvePieces:
    """What is left to do of a block's solve.

    Attributes:
        pieces: A piece ``solve`` has the number of its tile: of several groups that of the first one's.
        groups: Of every piece ``solve`` that is of whole groups, their numbers.
    """

    pieces: Sequence[Piece]
    groups: Mapping[PieceId, Groups]


def solve_pieces(block: int, works: Sequence[GroupWork], workers: Sequence[Worker]) -> SolvePieces:
    """Pieces of several groups of a block, each at home with some worker.

    A group has one home, and more of them, which prepare for themselves, only where all groups end sooner so.
    """
    homes = _homes(works, workers)
    pieces: list[Piece] = []
    groups: dict[PieceId, Groups] = {}
    for work in works:
        if work.is_cut:
            # All of one cost, though the last tile of a linear may be smaller: a worker ends one group before
            # the next.
            setup = Setup(name=(block, work.output, work.group), cost=work.prepare_cost)
            names = [PieceId(block, "solve", tile, work.output) for tile in work.tiles]
            tiles = [_solving(name, work.tile_cost, homes[work.output, name.part], setup) for name in names]
            pieces += [*tiles, _packing(block, work, tiles, workers[0])]
    for batch in _batches([work for work in works if not work.is_cut], homes):
        (tile,), output = batch[0].tiles, batch[0].output
        name = PieceId(block, "solve", tile, output)
        # Whoever solves whole groups keeps nothing of them.
        setup = Setup(name=(block, output, batch[0].group), cost=0.0)
        cost = sum(work.prepare_cost + work.tile_cost for work in batch)
        pieces.append(_solving(name, cost, homes[output, tile], setup))
        groups[name] = tuple(work.group for work in batch)
    return SolvePieces(pieces, groups)


def _batches(
    works: Sequence[GroupWork], homes: Mapping[tuple[int, int], Worker]
) -> Iterator[list[GroupWork]]:
    """Whole groups of one output and home that are alike, as many as a batch holds; else each alone."""
    alike: dict[tuple[int, Worker, Likeness], list[GroupWork]] = {}
    for work in works:
        if work.likeness is None:
            yield [work]
        else:
            (tile,) = work.tiles
            home = homes[work.output, tile]
            alike.setdefault((work.output, home, work.likeness), []).append(work)
    for (_, _, likeness), found in alike.items():
        by_group = {work.group: work for work in found}
        for batch in even_batches(list(by_group), likeness.most):
            yield [by_group[group] for group in batch]


def _solving(name: PieceId, cost: float, home: Worker, setup: Setup) -> Piece:
    return Piece(id=name, rank=name.block, cost=cost, home=home, setup=setup)


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
