"""The schedule under events in any order: each piece once, nobody idle beside work, no budget exceeded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import RecipeError
from quantlib.job.schedule import Piece, PieceId, Schedule, Setup


def _name(number: int) -> PieceId:
    return PieceId(block=0, stage="capture", part=number)


@st.composite
def _work(draw):
    """Pieces whose needs name earlier ones, and the memory of some workers, one of which can do them all."""
    count = draw(st.integers(1, 12))
    workers = draw(st.integers(1, 4))
    pieces = []
    for number in range(count):
        after = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        piece = Piece(
            id=_name(number),
            rank=draw(st.integers(0, 2)),
            cost=draw(st.sampled_from([0.5, 1.0, 4.0])),
            memory_bytes=draw(st.integers(0, 10)),
            after=frozenset(map(_name, after)),
            home=draw(st.sampled_from([None, *range(workers), -1])),
        )
        pieces.append(piece)
    memory = [10, *draw(st.lists(st.integers(0, 10), min_size=workers - 1, max_size=workers - 1))]
    return pieces, memory


def _check_all_busy(schedule: Schedule, memory: dict, undone: dict, finished: set) -> None:
    ready = [p for p in undone.values() if p.after <= finished and p not in schedule.running.values()]
    for worker in schedule.workers:
        if worker not in schedule.running:
            assert not [p for p in ready if p.memory_bytes <= memory[worker]], "an idle worker beside work"


@settings(max_examples=300, deadline=None)
@given(work=_work(), data=st.data())
def test_schedule_does_every_piece_once_whatever_the_order_of_events(work, data):
    pieces, sizes = work
    memory = dict(enumerate(sizes))
    schedule = Schedule()
    for worker, size in memory.items():
        schedule.join(worker, memory_bytes=size)
    cut = data.draw(st.integers(0, len(pieces)))
    to_add = [pieces[:cut], pieces[cut:]]
    undone: dict[PieceId, Piece] = {}
    finished: list[PieceId] = []
    while to_add or not schedule.is_over:
        if to_add and (schedule.is_over or data.draw(st.booleans())):
            batch = to_add.pop(0)
            schedule.add(batch)
            undone |= {piece.id: piece for piece in batch}
        for begun in schedule.assign():
            assert begun.piece.after <= set(finished)
            assert begun.piece.memory_bytes <= memory[begun.worker]
            assert schedule.running[begun.worker] is begun.piece
        running = schedule.running
        assert len({piece.id for piece in running.values()}) == len(running)
        _check_all_busy(schedule, memory, undone, set(finished))
        if not running:
            continue
        event = data.draw(st.sampled_from(["finish", "finish", "leave", "fail", "join"]))
        worker = data.draw(st.sampled_from(sorted(running)))
        if event == "finish":
            done = schedule.finish(worker)
            assert done.id not in finished
            finished.append(done.id)
            del undone[done.id]
        elif event == "fail":
            given_up = schedule.fail(worker)
            schedule.add([given_up])
        elif event == "leave" and worker != 0:  # worker 0 is the one that can do them all
            assert schedule.leave(worker) is running[worker]
        elif event == "join" and len(memory) < 8:
            memory[len(memory)] = data.draw(st.integers(0, 10))
            schedule.join(len(memory) - 1, memory_bytes=memory[len(memory) - 1])
    assert sorted(finished) == sorted(piece.id for piece in pieces)


def _schedule(workers: int, *pieces: Piece) -> Schedule:
    schedule = Schedule()
    for worker in range(workers):
        schedule.join(worker, memory_bytes=100)
    schedule.add(pieces)
    return schedule


def _begun(schedule: Schedule) -> dict[int, int]:
    return {begun.worker: begun.piece.id.part for begun in schedule.assign()}


def test_pieces_stay_at_home_while_there_is_enough_to_do():
    homes = [0, 0, 0, 1]
    schedule = _schedule(2, *(Piece(id=_name(n), home=home) for n, home in enumerate(homes)))
    assert _begun(schedule) == {0: 0, 1: 3}
    schedule.finish(0)
    assert _begun(schedule) == {0: 1}
    schedule.finish(1)
    assert _begun(schedule) == {1: 2}, "an idle worker takes what is at home elsewhere"


def test_ready_pieces_go_by_rank_then_cost():
    first = Piece(id=_name(0), rank=1, cost=9.0)
    second, third = Piece(id=_name(1), cost=1.0), Piece(id=_name(2), cost=2.0)
    schedule, order = _schedule(1, first, second, third), []
    while not schedule.is_over:
        order += _begun(schedule).values()
        schedule.finish(0)
    assert order == [2, 1, 0]


def test_a_piece_that_fits_nowhere_is_refused_with_the_number_that_would_do():
    with pytest.raises(RecipeError, match="needs 101 bytes") as caught:
        _schedule(2, Piece(id=_name(0), memory_bytes=101))
    assert caught.value.facts["option"] == "worker_memory"


def test_what_was_dropped_is_not_begun():
    schedule = _schedule(1, Piece(id=_name(0)), Piece(id=_name(1), after=frozenset({_name(0)})))
    schedule.drop([_name(1)])
    assert _begun(schedule) == {0: 0}
    schedule.finish(0)
    assert schedule.is_over


def _tile(number: int, setup_cost: float, home: int = 0) -> Piece:
    return Piece(id=_name(number), home=home, setup=Setup(name="factor", cost=setup_cost))


def _with_workers(count: int, pieces: list[Piece]) -> Schedule:
    schedule = Schedule()
    for worker in range(count):
        schedule.join(worker, memory_bytes=0)
    schedule.add(pieces)
    return schedule


def _begun(schedule: Schedule) -> dict[int, int]:
    return {begun.worker: begun.piece.id.part for begun in schedule.assign()}


def test_tiles_are_taken_from_a_home_that_begins_too():
    # The home would be done after 10 + 4, whoever takes a tile after 10 + 1.
    schedule = _with_workers(5, [_tile(number, 10.0) for number in range(4)])
    assert sorted(_begun(schedule)) == [0, 1, 2, 3]


def test_tile_is_left_to_a_home_that_has_prepared_unless_it_has_more_left_than_preparing_takes():
    for left, is_taken in ((4, False), (12, True)):
        schedule = _with_workers(1, [_tile(number, 10.0) for number in range(left + 2)])
        assert _begun(schedule) == {0: 0}
        schedule.finish(0)
        schedule.assign()
        schedule.join(1, memory_bytes=0)
        assert bool(_begun(schedule)) == is_taken


def test_worker_that_has_prepared_takes_the_last_tile_of_a_busy_home():
    schedule = _with_workers(2, [_tile(0, 10.0), _tile(1, 10.0, home=1), _tile(2, 10.0)])
    assert _begun(schedule) == {0: 0, 1: 1}
    schedule.finish(1)
    assert _begun(schedule) == {1: 2}


def test_tiles_of_a_home_that_is_gone_are_taken_whatever_they_take():
    schedule = _with_workers(1, [_tile(0, 10.0), _tile(1, 10.0)])
    schedule.assign()
    schedule.finish(0)
    schedule.leave(0)
    schedule.join(1, memory_bytes=0)
    assert _begun(schedule) == {1: 1}
