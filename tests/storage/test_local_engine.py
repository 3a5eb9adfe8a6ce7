"""What only the file system has."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from quantlib.errors import (
    CheckpointError,
    NoSpaceError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from quantlib.storage import local_files, open_store

store = pytest.fixture(lambda tmp_path: open_store(f"file://{tmp_path}"))


def test_folder_is_not_an_object(store, tmp_path):
    (tmp_path / "folder").mkdir()
    for call in (store.head, store.read):
        with pytest.raises(ObjectNotFoundError, match="folder"):
            call(f"file://{tmp_path}/folder")


def test_time_of_a_file_is_when_it_came_however_old_its_content_claims_to_be(store, tmp_path):
    path = tmp_path / "x"
    before = time.time()
    path.write_bytes(b"aaaa")
    os.utime(path, ns=(1, 1))
    found = store.head(f"file://{path}").modified_s
    assert found is not None
    assert found >= before - 1


def test_file_changed_in_place_with_the_same_size_is_refused(store, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"aaaa")
    os.utime(path, ns=(1, 1))
    info = store.head(f"file://{path}")
    path.write_bytes(b"bbbb")
    with pytest.raises(CheckpointError, match="changed while in use"):
        store.read_ranges(info, [(0, 4)])


def test_file_cut_off_after_it_was_opened_is_refused(store, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a" * 100)
    info = store.head(f"file://{path}")
    os.truncate(path, 50)
    with pytest.raises(CheckpointError):
        store.read_ranges(info, [(0, 100)])


def test_unfinished_writes_of_a_killed_process_are_not_listed(store, tmp_path):
    code = (
        "import os\n"
        "from quantlib.storage import open_store\n"
        f"with open_store('file:///').open_writer('file://{tmp_path}/out/shard') as writer:\n"
        "    writer.write(b'x' * 100000)\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert len(list((tmp_path / "out").iterdir())) == 1, "the temporary file is there"
    assert list(store.list(f"file://{tmp_path}")) == []


def test_write_below_a_file_is_one_of_our_errors(store, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/x"):
        store.write(f"file://{tmp_path}/file/x", b"")
    with pytest.raises(StorageError, match="file/x"):
        store.put_if_absent(f"file://{tmp_path}/file/x", b"")


def test_very_long_name_can_be_written(store, tmp_path):
    uri = f"file://{tmp_path}/{'n' * 250}"
    store.write(uri, b"x")
    assert store.read(uri) == b"x"


def test_links_to_files_are_listed_and_read(store, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(b"content")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/1")
    (info,) = store.list(f"file://{tmp_path}/snapshot")
    assert bytes(store.read_ranges(info, [(0, 3)])[0]) == b"con"


def _leave_part_file(uri):
    code = (
        "import os\n"
        "from quantlib.storage import open_store\n"
        f"with open_store({uri!r}).open_writer({uri!r}) as writer:\n"
        "    writer.write(b'x' * 100000)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9


def test_abort_uploads_removes_what_killed_writers_left_and_nothing_else(store, tmp_path):
    root = f"file://{tmp_path}"
    _leave_part_file(f"{root}/out/shard")
    _leave_part_file(f"{root}/out/deep/shard")
    _leave_part_file(f"{root}/output/shard")
    store.write(f"{root}/out/kept", b"x")
    with store.open_writer(f"{root}/out/alive") as writer:
        writer.write(b"still written")
        assert store.abort_uploads(f"{root}/out") == 2
        assert store.abort_uploads(f"{root}/out") == 0
    assert store.read(f"{root}/out/alive") == b"still written"
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["alive", "deep", "kept"]
    assert len(list((tmp_path / "output").iterdir())) == 1, "a neighbour with a longer name is left alone"


def test_no_hidden_file_is_left_beside_replaced_and_deleted_files(store, tmp_path):
    uri = f"file://{tmp_path}/lease"
    store.put_if_absent(uri, b"one")
    assert store.replace_if_match(uri, b"two", store.head(uri).etag)
    assert store.replace_if_match(uri, b"three", "other") is None
    store.write(f"file://{tmp_path}/other", b"")
    store.delete(f"file://{tmp_path}/other")
    assert [p.name for p in tmp_path.iterdir()] == ["lease"]


def test_versions_of_equal_size_in_quick_succession_have_etags_of_their_own(store, tmp_path):
    uri = f"file://{tmp_path}/lease"
    etags = [store.write(uri, b"0").etag]
    for _ in range(200):
        etags.append(store.replace_if_match(uri, b"1", etags[-1]).etag)
    assert len(set(etags)) == 201


def test_replaced_file_is_newer_than_one_from_a_machine_whose_clock_is_ahead(store, tmp_path):
    path = tmp_path / "lease"
    path.write_bytes(b"0")
    os.utime(path, ns=(1 << 62, 1 << 62))
    store.replace_if_match(f"file://{path}", b"1", store.head(f"file://{path}").etag)
    assert path.stat().st_mtime_ns == (1 << 62) + 1


def test_lock_that_is_never_given_back_ends_in_an_error_that_may_pass(store, tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "LOCK_LIMIT_S", 0.05)
    uri = f"file://{tmp_path}/lease"
    etag = store.write(uri, b"one").etag
    with local_files.locked(tmp_path / "lease"):
        (lock,) = tmp_path.glob(".lease*")
        with pytest.raises(TransientStorageError, match="locked by a process that does not go on"):
            store.replace_if_match(uri, b"two", etag)
    assert not lock.exists()
    assert store.replace_if_match(uri, b"two", etag) is not None


def test_lock_of_a_killed_process_stops_nobody(store, tmp_path):
    uri = f"file://{tmp_path}/lease"
    etag = store.write(uri, b"one").etag
    with local_files.locked(tmp_path / "lease"):
        (lock,) = tmp_path.glob(".lease*")
    lock.touch()
    assert store.replace_if_match(uri, b"two", etag) is not None
    lock.touch()
    assert store.abort_uploads(f"file://{tmp_path}") == 0, "a lock is no upload"
    assert not lock.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_so_and_leaves_the_former_file(store, tmp_path, monkeypatch, number):
    uri = f"file://{tmp_path}/x"
    etag = store.write(uri, b"former").etag

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    for call in (
        lambda: store.write(uri, b"new"),
        lambda: store.put_if_absent(f"{uri}2", b"new"),
        lambda: store.replace_if_match(uri, b"new", etag),
    ):
        with pytest.raises(NoSpaceError, match="free space, then run the same command again"):
            call()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"former")]


def test_delete_works_on_a_disk_too_full_for_a_lock(store, tmp_path, monkeypatch):
    uri = f"file://{tmp_path}/x"
    store.write(uri, b"former")

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    store.delete(uri)
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_locks_is_named_by_what_needs_them(store, tmp_path, monkeypatch):
    uri = f"file://{tmp_path}/x"
    etag = store.write(uri, b"former").etag

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StorageError, match="has no file locks"):
        store.replace_if_match(uri, b"new", etag)
    store.write(uri, b"new")
    store.delete(uri)
