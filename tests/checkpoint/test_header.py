"""Headers: a round trip with what layout writes, and with what the safetensors package writes and reads."""

import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.checkpoint.dtypes import dtype_name, torch_dtype
from quantlib.checkpoint.header import DTYPE_BYTES, Header, parse_header, read_header
from quantlib.checkpoint.layout import layout_shard
from quantlib.errors import CheckpointError
from quantlib.job.plan import TensorSpec
from quantlib.storage import open_store
from tests.support.checkpoints import shard_content, small_tensors

NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
SPECS = st.lists(
    st.builds(
        TensorSpec,
        name=NAMES.filter(lambda name: name != "__metadata__"),
        dtype=st.sampled_from(sorted(DTYPE_BYTES)),
        shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    unique_by=lambda spec: spec.name,
    max_size=8,
)


def _parse(content: bytes) -> Header:
    length = int.from_bytes(content[:8], "little")
    return parse_header(content[8 : 8 + length], shard="s", object_bytes=len(content))


@settings(max_examples=200, deadline=None)
@given(SPECS)
def test_header_of_any_layout_gives_back_its_specs_and_offsets(specs):
    layout = layout_shard(specs)
    header = _parse(layout.header + bytes(layout.size_bytes - len(layout.header)))
    assert header.metadata == {"format": "pt"}
    found = {name: (e.dtype, e.shape, (e.start, e.end)) for name, e in header.tensors.items()}
    assert found == {s.name: (s.dtype, s.shape, layout.offsets[s.name]) for s in specs}
    assert all(e.size_bytes == math.prod(e.shape) * DTYPE_BYTES[e.dtype] for e in header.tensors.values())


def test_file_written_by_the_safetensors_package_is_understood(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 7, dtype=torch.float16),
        "d": torch.tensor([True, False]),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    store = open_store(f"file://{tmp_path}")
    header = read_header(store, store.head(f"file://{tmp_path}/x.safetensors"))
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, tensor in tensors.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape) == (dtype_name(tensor.dtype), tuple(tensor.shape))
        raw = bytearray(content[entry.start : entry.end])
        back = torch.frombuffer(raw, dtype=tensor.dtype) if raw else torch.empty(0, dtype=tensor.dtype)
        assert torch.equal(back, tensor.reshape(-1))


def test_short_header_takes_one_request_and_a_long_one_two(tmp_path):
    store = open_store(f"file://{tmp_path}")
    many = {f"tensor.with.a.rather.long.name.{n}": small_tensors()["model.norm.weight"] for n in range(3000)}
    for tensors, wanted in ((small_tensors(), 1), (many, 2)):
        info = store.write(f"file://{tmp_path}/s", shard_content(tensors))
        before = store.traffic.requests
        assert len(read_header(store, info).tensors) == len(tensors)
        assert store.traffic.requests - before == wanted


def test_every_known_dtype_has_the_size_torch_gives_it():
    for name, size_bytes in DTYPE_BYTES.items():
        assert torch_dtype(name).itemsize == size_bytes
        assert dtype_name(torch_dtype(name)) == name


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_bytes_give_a_header_or_a_checkpoint_error(data):
    content = bytearray(shard_content(small_tensors()))
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(8, end - 1))
        kind = data.draw(st.sampled_from(["flip", "digit", "cut", "insert"]))
        if kind == "flip":
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "digit":
            content[position] = data.draw(st.sampled_from(b'0123456789-,:[]{}"eE. '))
        elif kind == "cut":
            del content[position : position + data.draw(st.integers(1, 9))]
        else:
            content[position:position] = data.draw(st.binary(max_size=9))
    try:
        header = parse_header(bytes(content[8:end]), shard="s", object_bytes=len(content))
    except CheckpointError as error:
        assert error.facts["shard"] == "s"
        return
    assert all(end <= e.start <= e.end <= len(content) for e in header.tensors.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("random")


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=300))
def test_random_bytes_hold_no_tensor(content, folder):
    store = open_store(f"file://{folder}")
    info = store.write(f"file://{folder}/x", content)
    try:
        assert read_header(store, info).tensors == {}
    except CheckpointError as error:
        assert error.message.startswith("x is not an intact safetensors file")
