"""GGUF headers that lie: every one is an error with a reason, none is believed, none takes memory or time."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.checkpoint.gguf_files.header import read_gguf_header
from quantlib.errors import CheckpointError
from quantlib.storage import open_store


def text(value):
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def tensor(name="x", dims=(32, 4), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(*, magic=b"GGUF", version=3, values=(), tensors=(), counts=None):
    num_tensors, num_values = counts or (len(tensors), len(values))
    start = magic + struct.pack("<IQQ", version, num_tensors, num_values)
    return start + b"".join(values) + b"".join(tensors)


def number(key, value):
    return text(key) + struct.pack("<II", 4, value)


SOUND = header(values=(number("a.b", 7),), tensors=(tensor(), tensor("y", (256,), 2, 512)))


def read(folder, content, data_bytes=1024):
    path = folder / "m.gguf"
    path.write_bytes(content + bytes(-len(content) % 32 + data_bytes))
    store = open_store("file:///")
    return read_gguf_header(store, store.head(f"file://{path}"))


def test_sound_header_says_what_is_in_it(tmp_path):
    found = read(tmp_path, SOUND)
    assert found.values == {"a.b": 7}
    assert [(t.name, t.shape, t.kind.name, t.end - t.start) for t in found.tensors] == [
        ("x", (4, 32), "F32", 512),
        ("y", (256,), "Q4_0", 144),
    ]


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(magic=b"GGML"), "does not begin with GGUF"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "little-endian"),
        (header(counts=(0, HUGE)), "appears twice|does not end within"),
        (header(counts=(HUGE, 0)), "does not end within|has 0 dims"),
        (header(values=(struct.pack("<Q", HUGE),)), "a value in its header has"),
        (header(values=(text("k") + struct.pack("<IIQ", 9, 8, HUGE),)), "does not end within"),
        (header(values=(text("k") + struct.pack("<IIQ", 9, 4, HUGE),)), "a value in its header has"),
        (header(values=(text("k") + struct.pack("<IIQ", 9, 9, 1),)), "array in its header is of the unknown"),
        (header(values=(text("k") + struct.pack("<I", 77),)), "unknown type 77"),
        (header(values=(text(b"\xff") + struct.pack("<II", 4, 0),)), "not UTF-8"),
        (header(values=(number("k", 1), number("k", 2))), "appears twice"),
        (header(values=(number("general.alignment", 3),)), "a power of two"),
        (header(values=(number("general.alignment", 0),)), "a power of two"),
        (header(tensors=(tensor(), tensor(offset=512))), "'x' appears twice"),
        (header(tensors=(tensor(), tensor("y", offset=128))), "overlap"),
        (header(tensors=(tensor(offset=1024),)), "ends at byte"),
        (header(tensors=(tensor(dims=(HUGE, HUGE)),)), "ends at byte"),
        (header(tensors=(tensor(kind=999),)), "unknown type 999"),
        (header(tensors=(tensor(dims=(33,), kind=2),)), "needs multiples of 32"),
        (header(tensors=(tensor(dims=()),)), "has 0 dims"),
        (header(tensors=(tensor(dims=(1,) * 5),)), "has 5 dims"),
        (header(tensors=(tensor("a\nb"),)), "dims, 1 to 4"),
    ],
)
def test_lie_is_told(tmp_path, content, said):
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path, content)


@pytest.mark.parametrize("length", range(0, len(SOUND), 7))
def test_cut_off_file_is_told(tmp_path, length):
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND[:length])
    store = open_store("file:///")
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        read_gguf_header(store, store.head(f"file://{path}"))


@settings(deadline=None, max_examples=200)
@given(place=st.integers(0, len(SOUND) - 1), byte=st.integers(0, 255))
def test_any_changed_byte_is_read_or_told(tmp_path_factory, place, byte):
    content = bytearray(SOUND)
    content[place] = byte
    try:
        found = read(tmp_path_factory.mktemp("m"), bytes(content))
    except CheckpointError:
        return
    assert all(0 < t.start <= t.end <= len(content) + 32 + 1024 for t in found.tensors)
