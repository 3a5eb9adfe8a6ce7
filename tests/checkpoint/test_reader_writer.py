"""Tensors out of and into shards, against numpy and the safetensors package."""

import hashlib
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

from quantlib.checkpoint.dtypes import dtype_name, torch_dtype
from quantlib.checkpoint.header import DTYPE_BYTES, TensorEntry
from quantlib.checkpoint.index import open_checkpoint
from quantlib.checkpoint.reader import read_tensors, tensor_of
from quantlib.checkpoint.writer import ShardWriter, write_shard
from quantlib.errors import CheckpointError, PackingError
from quantlib.job.plan import TensorSpec
from quantlib.storage import open_store
from tests.support.checkpoints import DTYPES, shard_content, small_tensors, write_checkpoint


def _open(folder):
    store = open_store("file:///")
    return store, open_checkpoint(store, f"file://{folder}")


def _specs(tensors):
    return [TensorSpec(name=n, dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items()]


def _bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_tensors_have_the_values_dtype_and_shape_that_were_stored(tmp_path):
    stored = write_checkpoint(tmp_path)
    store, checkpoint = _open(tmp_path)
    found = read_tensors(store, checkpoint, list(stored)[::-1])
    assert list(found) == list(stored)[::-1]
    for name, (dtype, values) in stored.items():
        assert found[name].dtype == torch_dtype(dtype)
        assert tuple(found[name].shape) == values.shape
        assert _bytes(found[name]) == values.astype(DTYPES[dtype]).tobytes()


def test_neighbouring_tensors_come_in_one_request(tmp_path):
    write_checkpoint(tmp_path, num_shards=1)
    store, checkpoint = _open(tmp_path)
    before = store.traffic.requests
    read_tensors(store, checkpoint, [n for n in checkpoint.tensors if n.startswith("model.layers.1")])
    assert store.traffic.requests - before == 1


def test_read_only_memory_of_an_engine_makes_an_ordinary_tensor():
    entry = TensorEntry(name="t", dtype="I32", shape=(2,), shard="s", start=0, end=8)
    was = torch.is_warn_always_enabled()
    # Torch warns of read-only memory once in a process; here every time.
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = tensor_of(memoryview(bytes([1, 0, 0, 0, 2, 0, 0, 0])), entry)
    finally:
        torch.set_warn_always(was)
    assert tensor.tolist() == [1, 2]


def test_tensors_may_be_written_to_without_an_effect_on_the_checkpoint(tmp_path):
    write_checkpoint(tmp_path, num_shards=1)
    store, checkpoint = _open(tmp_path)
    found = read_tensors(store, checkpoint, list(checkpoint.tensors))
    for tensor in found.values():
        tensor.zero_()
    again = read_tensors(store, checkpoint, ["model.norm.weight"])["model.norm.weight"]
    assert again.abs().sum() > 0


def test_unaligned_tensor_is_read_right(tmp_path):
    tensors = {
        "odd": ("U8", np.arange(3, dtype=np.uint8)),
        "after": ("F32", np.arange(5, dtype=np.float32)),
        "last": ("BF16", np.arange(7, dtype=np.uint16)),
    }
    write_checkpoint(tmp_path, tensors, num_shards=1)
    store, checkpoint = _open(tmp_path)
    found = read_tensors(store, checkpoint, ["odd", "after", "last"])
    assert found["after"].tolist() == [0, 1, 2, 3, 4]
    assert found["last"].view(torch.int16).tolist() == list(range(7))
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.values())


def test_unknown_tensor_is_named(tmp_path):
    write_checkpoint(tmp_path)
    store, checkpoint = _open(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'model.ghost'"):
        read_tensors(store, checkpoint, ["model.norm.weight", "model.ghost"])


def test_shard_replaced_after_opening_is_refused(tmp_path):
    write_checkpoint(tmp_path, num_shards=1)
    store, checkpoint = _open(tmp_path)
    store.write(f"file://{tmp_path}/model.safetensors", shard_content(small_tensors(seed=1)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced"):
        read_tensors(store, checkpoint, ["model.norm.weight"])


def test_written_shard_is_read_by_the_safetensors_package_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=generator, dtype=torch.uint8).to(torch_dtype(name))
        if name == "BOOL"
        else torch.randint(0, 100, (3, 5, DTYPE_BYTES[name]), generator=generator, dtype=torch.uint8)
        .view(torch_dtype(name))
        .reshape(3, 5)
        for name in DTYPE_BYTES
        if name != "F8_E8M0"
    }
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 3, dtype=torch.bfloat16)
    tensors["transposed"] = torch.arange(12.0).reshape(3, 4).T
    tensors["slice"] = torch.arange(12, dtype=torch.int32).reshape(3, 4)[:, 1::2]
    specs = _specs(tensors)[::-1]
    receipt = write_shard(open_store("file:///"), f"file://{tmp_path}/out/x.safetensors", specs, tensors)
    content = (tmp_path / "out" / "x.safetensors").read_bytes()
    assert receipt.sha256 == hashlib.sha256(content).hexdigest()
    assert receipt.size_bytes == len(content)
    found = safetensors.torch.load(content)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert _bytes(found[name]) == _bytes(tensor), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("a"), "'a' was promised, but is not there"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is there, but was not promised"),
        (lambda t: t.update(a=t["a"].half()), r"'a' was promised as F32 \[2, 3\] and made as F16 \[2, 3\]"),
        (lambda t: t.update(a=t["a"].T), r"'a' was promised as F32 \[2, 3\] and made as F32 \[3, 2\]"),
        (lambda t: t.update(a=t["a"].to("meta")), "'a' has no values"),
        (lambda t: t.update(a=torch.zeros(2, 3, dtype=torch.complex128)), "complex128 cannot be stored"),
    ],
)
def test_tensors_that_differ_from_the_plan_are_refused_before_anything_is_written(tmp_path, change, words):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    specs = _specs(tensors)
    change(tensors)
    with pytest.raises(PackingError, match=words):
        write_shard(open_store("file:///"), f"file://{tmp_path}/x.safetensors", specs, tensors)
    assert list(tmp_path.iterdir()) == []


def test_shard_written_tensor_by_tensor_has_the_bytes_of_one_written_at_once(tmp_path):
    tensors = {"a": torch.arange(6, dtype=torch.int32).reshape(2, 3), "b": torch.ones(5, dtype=torch.float16)}
    store, specs = open_store("file:///"), _specs(tensors)
    wanted = write_shard(store, f"file://{tmp_path}/whole.safetensors", specs, tensors)
    with ShardWriter(store, f"file://{tmp_path}/parts.safetensors", specs) as shard:
        for tensor in tensors.values():
            shard.add(tensor)
    assert (shard.receipt.sha256, shard.receipt.size_bytes) == (wanted.sha256, wanted.size_bytes)
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("second", [None, torch.ones(5), torch.ones(4, dtype=torch.float16)])
def test_shard_that_lacks_a_tensor_or_gets_another_one_is_not_stored(tmp_path, second):
    tensors = {"a": torch.zeros(3), "b": torch.ones(5, dtype=torch.float16)}
    shard = ShardWriter(open_store("file:///"), f"file://{tmp_path}/x.safetensors", _specs(tensors))
    with pytest.raises(PackingError, match="'b'"), shard:
        shard.add(tensors["a"])
        if second is not None:
            shard.add(second)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_shard_travels_through_s3_bit_for_bit(s3_environment, engine):
    folder = f"shards-{engine}"
    tensors = {"big": torch.randn(3000, 4001), "model.small": torch.randn(7, 3).bfloat16()}
    uri = s3_environment.uri(f"{folder}/model.safetensors")
    store = open_store(uri, engine)
    receipt = write_shard(store, uri, _specs(tensors), tensors)
    s3_environment.put(f"{folder}/config.json", b"{}")
    assert hashlib.sha256(s3_environment.get(f"{folder}/model.safetensors")).hexdigest() == receipt.sha256
    checkpoint = open_checkpoint(store, s3_environment.uri(folder))
    assert checkpoint.shards["model.safetensors"].etag == receipt.etag
    found = read_tensors(store, checkpoint, ["model.small", "big"])
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
