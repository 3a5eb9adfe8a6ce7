"""Shards that are broken, or made to hurt their reader: each refused by a message that names the culprit."""

import json
import struct

import numpy as np
import pytest

from quantlib.checkpoint.header import read_header
from quantlib.errors import CheckpointError
from quantlib.storage import open_store
from tests.support.checkpoints import shard_content


def _entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _two(first, second):
    return {"a": _entry(offsets=first), "b": _entry(offsets=second)}


def _raw(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


def _with(header, data_bytes=8) -> bytes:
    return _raw(json.dumps(header), bytes(data_bytes))


ONE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
CASES = {
    "empty object": (b"", "has 0 bytes"),
    "seven bytes": (b"\x01" * 7, "has 7 bytes"),
    "length 2^60": (struct.pack("<Q", 1 << 60) + b"{}", f"length is {1 << 60}"),
    "length 2^64-1": (struct.pack("<Q", (1 << 64) - 1) + b"{}", f"length is {(1 << 64) - 1}"),
    "length beyond the object": (
        struct.pack("<Q", 100) + b"{}",
        "length is 100 bytes, the whole object has 10",
    ),
    "length over 100 MB": (struct.pack("<Q", 100_000_001), "at most 100000000"),
    "length zero": (struct.pack("<Q", 0) + b"{}", "not a JSON object"),
    "not JSON": (_raw('{"a": }'), "not valid JSON"),
    "not UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "not valid JSON"),
    "a list": (_raw("[]"), "not a JSON object"),
    "space before the brace": (_raw(" {}"), "not a JSON object"),
    "two objects": (_raw("{}{}"), "not valid JSON"),
    "nested too deeply": (_raw('{"a":' + "[" * 100_000), "not valid JSON"),
    "NaN": (_raw(ONE.replace("[2]", "[NaN]"), bytes(8)), "NaN"),
    "number of 10 000 digits": (_raw(ONE.replace("[2]", f"[{'9' * 10_000}]"), bytes(8)), "not valid JSON"),
    "duplicate tensor": (_raw(ONE[:-1] + "," + ONE[1:], bytes(8)), "'a' appears twice"),
    "duplicate key in an entry": (
        _raw(ONE.replace('"dtype"', '"dtype":"F32","dtype"'), bytes(8)),
        "'dtype' appears",
    ),
    "entry is a list": (_with({"a": [1]}), "'a' is not an object"),
    "entry is null": (_with({"a": None}), "'a' is not an object"),
    "unknown dtype": (_with({"a": _entry(dtype="F128")}), "'a' has the dtype 'F128'"),
    "dtype is a list": (_with({"a": {**_entry(), "dtype": ["F32"]}}), r"'a' has the dtype \['F32'\]"),
    "no dtype": (_with({"a": {"shape": [2], "data_offsets": [0, 8]}}), "'a' has the dtype None"),
    "negative dim": (_with({"a": _entry(shape=[-2])}), r"'a' has the shape \[-2\]"),
    "two negative dims": (_with({"a": _entry(shape=[-1, -2])}), "'a' has the shape"),
    "fractional dim": (_with({"a": _entry(shape=[2.0])}), r"'a' has the shape \[2\.0\]"),
    "boolean dim": (_with({"a": _entry(shape=[True, 2])}), "'a' has the shape"),
    "text for a shape": (_with({"a": {**_entry(), "shape": "2"}}), "'a' has the shape"),
    "a thousand dims": (_with({"a": _entry(shape=[1] * 1000)}), "'a' has the shape"),
    "dims whose product overflows": (_with({"a": _entry(shape=[1 << 32, 1 << 32])}), "'a' .*needs"),
    "huge dims": (_with({"a": _entry(shape=[1 << 62] * 64)}), "'a' .*needs"),
    "dim beyond 2^63": (_with({"a": _entry(shape=[1 << 70])}), "'a' has the shape"),
    "three offsets": (_with({"a": _entry(offsets=[0, 4, 8])}), "'a' has the data_offsets"),
    "negative offset": (_with({"a": _entry(offsets=[-8, 0])}), "'a' has the data_offsets"),
    "offset beyond 2^63": (
        _with({"a": _entry(offsets=[1 << 65, (1 << 65) + 8])}),
        "'a' has the data_offsets",
    ),
    "end before begin": (_with({"a": _entry(offsets=[8, 0])}), "'a' .*needs 8 bytes"),
    "size is not dtype times shape": (_with({"a": _entry(offsets=[0, 4])}), "'a' .*needs 8 bytes"),
    "out of range": (_with({"a": _entry(offsets=[8, 16])}), "'a' ends at data byte 16, the object holds 8"),
    "cut off": (_with({"a": _entry(shape=[4], offsets=[0, 16])}), "'a' ends at .*cut off"),
    "overlap": (_with(_two([0, 8], [4, 12]), 12), "'a' and 'b' overlap"),
    "same place twice": (_with(_two([0, 8], [0, 8])), "'a' and 'b' overlap"),
    "hole at the front": (_with({"a": _entry(offsets=[4, 12])}, 12), "4 bytes before tensor 'a'"),
    "hole in the middle": (_with(_two([0, 8], [12, 20]), 20), "4 bytes before tensor 'b'"),
    "hole at the end": (_with({"a": _entry()}, 12), "last 4 bytes"),
    "no tensors but data": (_with({}, 4), "last 4 bytes"),
    "empty tensor off the end": (_with({"a": _entry(), "b": _entry([0], [9, 9])}), "'b' ends at data byte 9"),
    "empty tensor inside another": (_with({"a": _entry(), "b": _entry([0], [4, 4])}), "'a' and 'b' overlap"),
    "metadata is a list": (_with({"__metadata__": [], "a": _entry()}), "__metadata__"),
    "metadata holds a number": (_with({"__metadata__": {"n": 1}, "a": _entry()}), "__metadata__"),
    "lone surrogate in a name": (_raw(ONE.replace('"a"', '"\\ud800"'), bytes(8)), "tensor name"),
    "control character in a name": (_with({"a\x1b[31m": _entry()}), "tensor name"),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed_shard_is_refused_by_name(case, tmp_path):
    content, words = CASES[case]
    store = open_store(f"file://{tmp_path}")
    info = store.write(f"file://{tmp_path}/model-00007.safetensors", content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(store, info)
    assert str(caught.value).startswith("model-00007.safetensors is not an intact safetensors file")
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_header_of_exactly_the_allowed_length_is_not_refused_for_it(tmp_path):
    tensor = {"a": ("F32", np.zeros(2, np.float32))}
    header = json.dumps({"a": _entry()}).encode()
    store = open_store(f"file://{tmp_path}")
    info = store.write(f"file://{tmp_path}/x", shard_content(tensor, header=header + b" " * 200_000))
    assert list(read_header(store, info).tensors) == ["a"]
