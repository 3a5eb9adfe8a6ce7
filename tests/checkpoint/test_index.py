import json
import threading

import pytest

from quantlib.checkpoint.index import open_checkpoint
from quantlib.storage import open_store
from tests.support.checkpoints import DTYPES, shard_content, small_tensors, write_checkpoint


@pytest.mark.parametrize("num_shards", [1, 2, 3, 11])
def test_every_tensor_is_found_where_its_bytes_are(tmp_path, num_shards):
    tensors = write_checkpoint(tmp_path, num_shards=num_shards)
    checkpoint = open_checkpoint(open_store("file:///"), f"file://{tmp_path}")
    assert checkpoint.config["model_type"] == "llama"
    assert len(checkpoint.shards) == num_shards
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, (dtype, values) in tensors.items():
        entry = checkpoint.tensors[name]
        content = (tmp_path / entry.shard).read_bytes()[entry.start : entry.end]
        assert (entry.dtype, entry.shape) == (dtype, values.shape)
        assert content == values.astype(DTYPES[dtype]).tobytes()


def test_headers_take_one_request_a_shard(tmp_path):
    write_checkpoint(tmp_path, num_shards=5)
    store = open_store("file:///")
    open_checkpoint(store, f"file://{tmp_path}")
    assert store.traffic.requests == 1 + 2 + 5, "a listing, config and index, five headers"


def test_tensor_the_index_forgets_is_kept(tmp_path):
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    assert "model.norm.weight" in open_checkpoint(open_store("file:///"), f"file://{tmp_path}").tensors


def test_side_files_are_those_worth_copying(tmp_path):
    write_checkpoint(tmp_path)
    wanted = [
        "LICENSE",
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    others = [
        ".gitattributes",
        "modeling_llama.py",
        "optimizer.pt",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "quantize_config.json",
        "quantmill_report.json",
        "tokenizer.bin",
        "tokenizer_hack.py",
        "weights.gguf",
    ]
    for name in wanted + others:
        (tmp_path / name).write_text("{}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(open_store("file:///"), f"file://{tmp_path}")
    assert list(checkpoint.side_files) == wanted


def test_opening_leaves_no_thread_behind(tmp_path):
    write_checkpoint(tmp_path)
    store = open_store("file:///")
    open_checkpoint(store, f"file://{tmp_path}")
    assert not [t for t in threading.enumerate() if t.name.startswith("header")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_checkpoint_in_s3_is_the_same(tmp_path, s3_environment, engine):
    tensors = write_checkpoint(tmp_path)
    uri = s3_environment.put_folder(tmp_path, f"index-{engine}")
    s3_environment.put(f"index-{engine}/nested/model.safetensors", shard_content(small_tensors()))
    local = open_checkpoint(open_store("file:///"), f"file://{tmp_path}")
    remote = open_checkpoint(open_store(uri, engine), uri)
    assert remote.tensors == local.tensors
    assert len(remote.tensors) == len(tensors)
    assert list(remote.side_files) == ["tokenizer.json"]
