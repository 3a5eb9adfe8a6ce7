"""Pieces of a solve: each tile once, packed when all of a group are there, prepared again only where that
helps."""

from hypothesis import given
from hypothesis import strategies as st

from quantlib.job.schedule import PieceId, Schedule
from quantlib.job.solve_pieces import GroupWork, solve_pieces


def _work(group, tiles, prepare_cost, tile_cost=1.0, *, is_cut=True):
    return GroupWork(
        group=group, tiles=tuple(tiles), is_cut=is_cut, prepare_cost=prepare_cost, tile_cost=tile_cost
    )


def _homes(pieces):
    return [piece.home for piece in pieces if piece.id.stage == "solve"]


def test_group_that_is_cut_is_packed_after_its_tiles_and_another_not():
    pieces = solve_pieces(3, [_work(0, [0, 1], 5.0), _work(1, [2], 5.0, is_cut=False)], [7])
    tiles = {PieceId(3, "solve", number) for number in (0, 1)}
    assert {piece.id: piece.after for piece in pieces} == {
        **dict.fromkeys(tiles, frozenset()),
        PieceId(3, "pack", 0): tiles,
        PieceId(3, "solve", 2): frozenset(),
    }
    assert {piece.home for piece in pieces} == {7}


def test_group_whose_tiles_were_all_solved_before_is_packed():
    (piece,) = solve_pieces(0, [_work(2, [], 5.0)], [1])
    assert piece.id == PieceId(0, "pack", 2) and not piece.after


def test_group_has_as_many_homes_as_end_it_sooner():
    # Alone 10 + 4; each further home prepares for 10 to save a tile of 1, but all at a time end after 11.
    assert len(set(_homes(solve_pieces(0, [_work(0, range(4), 10.0)], range(8))))) == 4
    # With as many groups as workers nobody is left to prepare once more.
    works = [_work(group, range(4 * group, 4 * group + 4), 10.0) for group in range(3)]
    homes = _homes(solve_pieces(0, works, range(3)))
    assert [len(set(homes[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.5, 3.0, 20.0])), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_every_piece_is_done_once_and_one_worker_alone_prepares_once_a_group(groups, workers):
    works, first = [], 0
    for number, (count, prepare_cost) in enumerate(groups):
        works.append(_work(number, range(first, first + count), prepare_cost, is_cut=count > 1))
        first += count
    pieces = {piece.id: piece for piece in solve_pieces(0, works, range(workers))}
    group_of = {tile: work.group for work in works for tile in work.tiles}
    schedule = Schedule()
    for worker in range(workers):
        schedule.join(worker, memory_bytes=0)
    schedule.add(pieces.values())
    done, order = [], {worker: [] for worker in range(workers)}
    while not schedule.is_over:
        for begun in schedule.assign():
            if begun.piece.id.stage == "solve":
                order[begun.worker].append(group_of[begun.piece.id.part])
        for worker in list(schedule.running):
            done.append(schedule.finish(worker).id)
    assert sorted(done) == sorted(pieces)
    if workers == 1:
        changes = sum(a != b for a, b in zip(order[0], order[0][1:], strict=False))
        assert changes == len(groups) - 1
