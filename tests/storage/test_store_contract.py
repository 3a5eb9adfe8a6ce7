"""What every engine must do, the same tests for all of them."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from quantlib.errors import CheckpointError, ObjectNotFoundError
from quantlib.storage import ranges


def test_write_then_head_and_read_return_what_was_stored(place):
    uri = f"{place.root}/a/b.txt"
    written = place.store.write(uri, b"hello")
    assert written == place.store.head(uri)
    assert (written.uri, written.size_bytes) == (uri, 5)
    assert place.store.read(uri) == b"hello"


def test_write_twice_changes_content_and_etag(place):
    uri = f"{place.root}/a"
    first = place.store.write(uri, b"one..")
    second = place.store.write(uri, b"two..")
    assert place.store.read(uri) == b"two.."
    assert first.etag != second.etag


def test_head_and_list_tell_when_an_object_was_last_replaced(place):
    uri = f"{place.root}/a"
    before = time.time()
    place.store.write(uri, b"one")
    place.store.write(uri, b"two")
    times = [place.store.head(uri).modified_s, *(info.modified_s for info in place.store.list(place.root))]
    # Servers of S3 tell whole seconds.
    assert all(before - 1 <= found <= time.time() for found in times)


def test_empty_object_can_be_written_and_read(place):
    uri = f"{place.root}/empty"
    place.store.write(uri, b"")
    info = place.store.head(uri)
    assert info.size_bytes == 0
    assert place.store.read(uri) == b""
    assert [bytes(v) for v in place.store.read_ranges(info, [(0, 0)])] == [b""]


def test_odd_names_survive(place):
    names = ["sp ace.txt", "per%41cent", "plus+and=", "a#b?c"]
    for name in names:
        place.store.write(f"{place.root}/{name}", name.encode())
    assert [i.uri for i in place.store.list(place.root)] == sorted(f"{place.root}/{n}" for n in names)
    assert place.store.read(f"{place.root}/per%41cent") == b"per%41cent"


def test_list_is_sorted_recursive_and_knows_only_whole_folders(place):
    for name in ("x/2", "x/1", "x/deep/3", "xy/4"):
        place.store.write(f"{place.root}/{name}", b"..")
    listed = place.store.list(f"{place.root}/x")
    assert [i.uri for i in listed] == [f"{place.root}/x/{n}" for n in ("1", "2", "deep/3")]
    assert listed[0] == place.store.head(f"{place.root}/x/1")
    flat = place.store.list(f"{place.root}/x", recursive=False)
    assert [i.uri for i in flat] == [f"{place.root}/x/{n}" for n in ("1", "2")]
    assert list(place.store.list(f"{place.root}/nothing")) == []


def test_list_of_more_than_a_page_is_complete(place):
    count = 1100 if place.engine != "local" else 50
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: place.store.write(f"{place.root}/many/{n:05d}", b""), range(count)))
    assert len(place.store.list(f"{place.root}/many")) == count


def test_delete_removes_and_is_silent_when_nothing_is_there(place):
    uri = f"{place.root}/gone"
    place.store.write(uri, b"x")
    place.store.delete(uri)
    place.store.delete(uri)
    with pytest.raises(ObjectNotFoundError):
        place.store.head(uri)


def test_missing_object_is_named_by_every_reading_method(place):
    uri = f"{place.root}/missing.json"
    for call in (place.store.head, place.store.read):
        with pytest.raises(ObjectNotFoundError, match=r"missing\.json.*does not exist"):
            call(uri)


def test_ranges_come_back_in_the_order_asked_for(place):
    content = random.Random(1).randbytes(100_000)
    info = place.store.write(f"{place.root}/r", content)
    asked = [(50_000, 60_000), (0, 1), (99_999, 100_000), (10, 10), (55_000, 70_000), (0, 100_000)]
    views = place.store.read_ranges(info, asked)
    assert [bytes(v) for v in views] == [content[a:b] for a, b in asked]


def test_ranges_larger_than_a_request_are_assembled(place, monkeypatch):
    monkeypatch.setattr(ranges, "MAX_REQUEST_BYTES", 1000)
    monkeypatch.setattr(ranges, "MAX_GAP_BYTES", 10)
    content = random.Random(2).randbytes(20_001)
    info = place.store.write(f"{place.root}/r", content)
    asked = [(3, 9_998), (9_998, 10_100), (10_105, 20_001), (5, 6)]
    views = place.store.read_ranges(info, asked)
    assert [bytes(v) for v in views] == [content[a:b] for a, b in asked]


def test_range_beyond_the_end_is_refused(place):
    info = place.store.write(f"{place.root}/short", b"12345")
    for wrong in ((0, 6), (-1, 2), (4, 3), (1 << 62, 1 << 63)):
        with pytest.raises(CheckpointError, match="short"):
            place.store.read_ranges(info, [(0, 1), wrong])


def test_ranges_of_a_replaced_object_are_refused(place):
    uri = f"{place.root}/pinned"
    old = place.store.write(uri, b"a" * 1000)
    new = place.store.write(uri, b"b" * 1000)
    with pytest.raises(CheckpointError, match="pinned was replaced"):
        place.store.read_ranges(old, [(0, 10)])
    assert bytes(place.store.read_ranges(new, [(0, 3)])[0]) == b"bbb"


def test_ranges_of_a_deleted_object_are_not_found(place):
    info = place.store.write(f"{place.root}/was", b"a" * 10)
    place.store.delete(info.uri)
    with pytest.raises(ObjectNotFoundError):
        place.store.read_ranges(info, [(0, 10)])


def test_put_if_absent_stores_once(place):
    uri = f"{place.root}/done/unit.json"
    assert place.store.put_if_absent(uri, b"first") is True
    assert place.store.put_if_absent(uri, b"second") is False
    assert place.store.read(uri) == b"first"


def test_put_if_absent_race_has_one_winner(place):
    for attempt in range(3):
        uri = f"{place.root}/race-{attempt}"
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n, u=uri: place.store.put_if_absent(u, b"%d" % n), range(8)))
        assert sum(won) == 1
        assert place.store.read(uri) == b"%d" % won.index(True)
    assert len(place.store.list(place.root)) == 3


def test_writer_streams_what_was_written_in_pieces(place):
    uri = f"{place.root}/stream"
    content = random.Random(3).randbytes(3_000_001)
    with place.store.open_writer(uri) as writer:
        writer.write(b"")
        writer.write(bytearray(content[:10]))
        writer.write(memoryview(content)[10:2_000_000])
        writer.write(content[2_000_000:])
    assert writer.info == place.store.head(uri)
    assert place.store.read(uri) == content


def test_writer_without_content_makes_an_empty_object(place):
    with place.store.open_writer(f"{place.root}/empty"):
        pass
    assert place.store.read(f"{place.root}/empty") == b""


def test_writer_lets_its_caller_reuse_the_buffer(place):
    buffer = bytearray(b"1111")
    with place.store.open_writer(f"{place.root}/reuse") as writer:
        writer.write(buffer)
        buffer[:] = b"2222"
        writer.write(buffer)
    assert place.store.read(f"{place.root}/reuse") == b"11112222"


def test_object_appears_only_when_the_writer_ends(place):
    uri = f"{place.root}/late"
    with place.store.open_writer(uri) as writer:
        writer.write(b"x" * 100_000)
        assert list(place.store.list(place.root)) == []
    assert [i.uri for i in place.store.list(place.root)] == [uri]


def test_writer_that_fails_leaves_the_former_object(place):
    uri = f"{place.root}/kept"
    place.store.write(uri, b"former")
    with pytest.raises(KeyError), place.store.open_writer(uri) as writer:
        writer.write(b"x" * 100_000)
        raise KeyError("stop")
    assert place.store.read(uri) == b"former"
    assert len(place.store.list(place.root)) == 1


def test_traffic_counts_content_both_ways(place):
    before = place.store.traffic.requests
    info = place.store.write(f"{place.root}/t", b"x" * 1000)
    place.store.read_ranges(info, [(0, 100), (100, 300)])
    place.store.read(info.uri)
    assert place.store.traffic.bytes_written == 1000
    assert place.store.traffic.bytes_read == 1300
    assert place.store.traffic.requests - before == 3


def test_read_with_info_gives_content_and_the_etag_of_head(place):
    uri = f"{place.root}/lease.json"
    written = place.store.write(uri, b"content")
    assert place.store.read_with_info(uri) == (b"content", written) == (b"content", place.store.head(uri))
    with pytest.raises(ObjectNotFoundError, match=r"missing\.json"):
        place.store.read_with_info(f"{place.root}/missing.json")


def test_replace_if_match_stores_only_over_the_version_named(place):
    uri = f"{place.root}/lease.json"
    assert place.store.put_if_absent(uri, b"one")
    _, first = place.store.read_with_info(uri)
    second = place.store.replace_if_match(uri, b"two", first.etag)
    assert second == place.store.head(uri)
    assert place.store.replace_if_match(uri, b"three", first.etag) is None
    assert place.store.read_with_info(uri) == (b"two", second)
    third = place.store.replace_if_match(uri, b"three", second.etag)
    assert place.store.read_with_info(uri) == (b"three", third)


def test_replace_if_match_makes_nothing_where_the_object_is_gone(place):
    uri = f"{place.root}/folder/gone"
    info = place.store.write(uri, b"x")
    place.store.delete(uri)
    assert place.store.replace_if_match(uri, b"y", info.etag) is None
    assert place.store.replace_if_match(f"{place.root}/never/was", b"y", info.etag) is None
    assert list(place.store.list(place.root)) == []


def test_replace_if_match_race_has_one_winner(place):
    uri = f"{place.root}/race"
    for attempt in range(3):
        place.store.write(uri, b"start %d" % attempt)
        etag = place.store.head(uri).etag
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n, e=etag: place.store.replace_if_match(uri, b"%d" % n, e), range(8)))
        (winner,) = [n for n, info in enumerate(won) if info is not None]
        assert place.store.read_with_info(uri) == (b"%d" % winner, won[winner])


def test_counter_kept_with_replace_if_match_loses_no_step(place):
    uri = f"{place.root}/counter"
    place.store.write(uri, b"0 of nobody")

    def step(me: int) -> None:
        done = False
        while not done:
            content, info = place.store.read_with_info(uri)
            # Whose it is makes each content different: equal ones could not be told apart.
            mine = b"%d of %d" % (int(content.split()[0]) + 1, me)
            done = place.store.replace_if_match(uri, mine, info.etag) is not None

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(step, range(40)))
    assert place.store.read(uri).split()[0] == b"40"


def test_abort_uploads_leaves_objects_alone(place):
    place.store.write(f"{place.root}/a/b", b"x")
    assert place.store.abort_uploads(place.root) == 0
    assert place.store.abort_uploads(f"{place.root}/nothing") == 0
    assert place.store.read(f"{place.root}/a/b") == b"x"
