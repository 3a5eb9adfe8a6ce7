"""What only the file system has."""

import os
import subprocess
import sys

import pytest

from quantlib.errors import CheckpointError, ObjectNotFoundError, StorageError
from quantlib.storage import open_store

store = pytest.fixture(lambda tmp_path: open_store(f"file://{tmp_path}"))


def test_folder_is_not_an_object(store, tmp_path):
    (tmp_path / "folder").mkdir()
    for call in (store.head, store.read):
        with pytest.raises(ObjectNotFoundError, match="folder"):
            call(f"file://{tmp_path}/folder")


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
