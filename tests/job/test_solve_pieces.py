"""Pieces of a solve: each tile once, packed when all of a group are there, prepared again only where that
helps."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from quantlib.job.alike_groups import Likeness
from quantlib.job.schedule import PieceId, Schedule
from quantlib.job.solve_pieces import GroupWork, solve_pieces


def _work(group, tiles, prepare_cost, tile_cost=1.0, *, is_cut=True, likeness=None):
    return GroupWork(
        group=group,
        tiles=tuple(tiles),
        is_cut=is_cut,
        prepare_cost=prepare_cost,
        tile_cost=tile_cost,
        likeness=likeness,
    )


def _homes(pieces):
    return [piece.home for piece in pieces if piece.id.stage == "solve"]


def _likeness(rows, most):
    return Likeness(method="gptq", scheme=None, rows=(rows,), columns=64, most=most)


def test_group_that_is_cut_is_packed_after_its_tiles_and_another_not():
    work = solve_pieces(3, [_work(0, [0, 1], 5.0), _work(1, [2], 5.0, is_cut=False)], [7])
    assert work.groups == {PieceId(3, "solve", 2): (1,)}
    pieces = work.pieces
    tiles = {PieceId(3, "solve", number) for number in (0, 1)}
    assert {piece.id: piece.after for piece in pieces} == {
        **dict.fromkeys(tiles, frozenset()),
        PieceId(3, "pack", 0): tiles,
        PieceId(3, "solve", 2): frozenset(),
    }
    assert {piece.home for piece in pieces} == {7}


def test_group_whose_tiles_were_all_solved_before_is_packed():
    (piece,) = solve_pieces(0, [_work(2, [], 5.0)], [1]).pieces
    assert piece.id == PieceId(0, "pack", 2) and not piece.after


def test_group_has_as_many_homes_as_end_it_sooner():
    # Alone 10 + 4; each further home prepares for 10 to save a tile of 1, but all at a time end after 11.
    assert len(set(_homes(solve_pieces(0, [_work(0, range(4), 10.0)], range(8)).pieces))) == 4
    # With as many groups as workers nobody is left to prepare once more.
    works = [_work(group, range(4 * group, 4 * group + 4), 10.0) for group in range(3)]
    homes = _homes(solve_pieces(0, works, range(3)).pieces)
    assert [len(set(homes[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]


def test_alike_groups_of_one_home_are_a_piece():
    gates, downs = _likeness(32, 4), _likeness(64, 4)
    works = [_work(n, [n], 2.0, is_cut=False, likeness=(gates, downs)[n % 2]) for n in range(8)]
    works.append(_work(8, [8], 2.0, is_cut=False))
    work = solve_pieces(0, works, [0])
    parts = {name.part: groups for name, groups in work.groups.items()}
    assert parts == {8: (8,), 0: (0, 2, 4, 6), 1: (1, 3, 5, 7)}
    assert {piece.id.part: piece.cost for piece in work.pieces} == {8: 3.0, 0: 12.0, 1: 12.0}


@given(
    kinds=st.lists(st.sampled_from([(16, 2), (16, 3), (32, 9), None]), min_size=1, max_size=40),
    workers=st.integers(1, 5),
)
def test_batches_hold_every_group_once_and_workers_share_as_without_them(kinds, workers):
    def works(*, are_alike):
        made = [kind and _likeness(*kind) if are_alike else None for kind in kinds]
        return [
            _work(n, [n], 1.0 if kind is None else kind[0], is_cut=False, likeness=likeness)
            for n, (kind, likeness) in enumerate(zip(kinds, made, strict=True))
        ]

    found, alone = (solve_pieces(0, works(are_alike=x), range(workers)) for x in (True, False))
    homes = {piece.id.part: piece.home for piece in alone.pieces}
    assert sorted(group for groups in found.groups.values() for group in groups) == list(range(len(kinds)))
    assert {piece.id for piece in found.pieces} == found.groups.keys()
    for piece in found.pieces:
        groups = found.groups[piece.id]
        assert {homes[group] for group in groups} == {piece.home}
        kind = kinds[groups[0]]
        assert {kinds[group] for group in groups} == {kind}
        assert len(groups) <= (1 if kind is None else kind[1])
    for worker in range(workers):
        costs = [sum(p.cost for p in x.pieces if p.home == worker) for x in (found, alone)]
        assert costs[0] == costs[1]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.5, 3.0, 20.0])), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_every_piece_is_done_once_and_one_worker_alone_prepares_once_a_group(groups, workers):
    works, first = [], 0
    for number, (count, prepare_cost) in enumerate(groups):
        works.append(_work(number, range(first, first + count), prepare_cost, is_cut=count > 1))
        first += count
    pieces = {piece.id: piece for piece in solve_pieces(0, works, range(workers)).pieces}
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


def test_groups_of_several_outputs_are_no_batch():
    alike = _likeness(32, 4)
    works = [
        dataclasses.replace(_work(n, [n], 2.0, is_cut=False, likeness=alike), output=output)
        for output in (0, 1)
        for n in range(2)
    ]
    names = [PieceId(0, "solve", 0, output) for output in (0, 1)]
    assert solve_pieces(0, works, [0]).groups == dict.fromkeys(names, (0, 1))
