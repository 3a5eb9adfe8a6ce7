"""Checkpoint folders that are incomplete, contradictory or hostile: one clear error each."""

import json

import numpy as np
import pytest

from quantlib.checkpoint.index import open_checkpoint
from quantlib.errors import CheckpointError, ObjectNotFoundError
from quantlib.storage import open_store
from tests.support.checkpoints import shard_content, small_tensors, write_checkpoint, write_index

FIRST = "model-00001-of-00003.safetensors"
LAST = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def _refusal(folder, words, kind=CheckpointError) -> str:
    uri = f"file://{folder}"
    with pytest.raises(kind, match=words) as caught:
        open_checkpoint(open_store(uri), uri)
    return str(caught.value)


def _edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_nothing_at_the_address(tmp_path):
    assert str(tmp_path / "void") in _refusal(tmp_path / "void", "nothing was found", ObjectNotFoundError)


def test_no_config(folder):
    (folder / "config.json").unlink()
    message = _refusal(folder, r"holds no config\.json")
    assert str(folder) in message and FIRST in message


@pytest.mark.parametrize("text", ["{", "", "\xff", "[" * 100_000])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    _refusal(folder, r"config\.json is not valid JSON")


def test_config_that_is_a_list(folder):
    (folder / "config.json").write_text("[]")
    _refusal(folder, r"config\.json holds a JSON list")


def test_index_that_is_not_json(folder):
    (folder / INDEX).write_text("{")
    _refusal(folder, r"model\.safetensors\.index\.json is not valid JSON")


@pytest.mark.parametrize("values", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_index_without_a_weight_map(folder, values):
    (folder / INDEX).write_text(json.dumps(values))
    _refusal(folder, "no weight_map")


def test_missing_shard(folder):
    (folder / LAST).unlink()
    message = _refusal(folder, "1 are missing")
    assert LAST in message and FIRST not in message


def test_truncated_shard(folder):
    content = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(content[:-1])
    assert _refusal(folder, "cut off").startswith(LAST)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x.bin",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        ".safetensors",
        "s3://other/x.safetensors",
        7,
        None,
        ["a.safetensors"],
        {"a": 1},
    ],
)
def test_index_that_names_anything_but_a_file_beside_it(folder, name):
    # The file is there: it is the name that must be refused.
    (folder.parent / "x.safetensors").write_bytes(shard_content(small_tensors()))
    _edit_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    message = _refusal(folder, "only the name of a .safetensors file beside the index")
    assert "'model.norm.weight'" in message and repr(name) in message


def test_index_that_names_a_tensor_its_shard_lacks(folder):
    _edit_index(folder, lambda weight_map: weight_map.update({"model.ghost": FIRST}))
    assert FIRST in _refusal(folder, "'model.ghost' .* no shard has it")


def test_index_that_places_a_tensor_in_the_wrong_shard(folder):
    _edit_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": FIRST}))
    assert LAST in _refusal(folder, f"'model.norm.weight' in {FIRST}, but it is in")


def test_tensor_in_two_shards(folder):
    content = {"model.embed_tokens.weight": ("F32", np.zeros(2, np.float32))}
    (folder / LAST).write_bytes(shard_content(content))
    (folder / "model-00002-of-00003.safetensors").unlink()
    write_index(folder, {"model.embed_tokens.weight": FIRST, "other": LAST}, content)
    message = _refusal(folder, "'model.embed_tokens.weight' is in both")
    assert FIRST in message and LAST in message


def test_only_pickled_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x02.")
    message = _refusal(folder, r"pytorch_model-00001-of-00002\.bin")
    assert "save_pretrained it as safetensors" in message


def test_no_weights_at_all(folder):
    for path in folder.glob("model*"):
        path.unlink()
    _refusal(folder, "holds no weights: neither model.safetensors nor model.safetensors.index.json")


def test_single_file_beside_an_index_of_other_shards(folder):
    (folder / "model.safetensors").write_bytes(shard_content(small_tensors()))
    _refusal(folder, "both model.safetensors and an index")


def test_shard_that_is_a_folder(folder):
    (folder / LAST).unlink()
    (folder / LAST).mkdir()
    assert LAST in _refusal(folder, "are missing")


def test_first_damaged_shard_is_named_when_several_are(folder):
    for name in (FIRST, LAST):
        (folder / name).write_bytes(b"short")
    assert _refusal(folder, "has 5 bytes").startswith(FIRST)
