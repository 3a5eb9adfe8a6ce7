"""Which folders below a prefix are checkpoints, and which of them are whole."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import CheckpointError
from quantlib.job.new_checkpoints import (
    CheckpointFolder,
    checkpoint_folders,
    fault_of,
    settles_in_s,
    source_files,
)
from quantlib.storage import Store, open_store
from tests.support.checkpoints import write_checkpoint

STORE: Store = open_store("file:///")


def found_below(prefix: Path, depth: int = 1, excluded: tuple[str, ...] = ()) -> dict[str, CheckpointFolder]:
    folders = checkpoint_folders(STORE, f"file://{prefix}", depth=depth, excluded=excluded)
    return {folder.name: folder for folder in folders}


def test_folders_with_a_config_or_weights_are_found_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path / "whole")
    write_checkpoint(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    found = found_below(tmp_path)
    assert sorted(found) == ["bare", "whole"]
    assert fault_of(STORE, found["whole"]) is None
    assert "config.json" in str(fault_of(STORE, found["bare"]))
    assert found["whole"].uri == f"file://{tmp_path}/whole"


def test_depth_says_how_deep_and_folders_of_a_checkpoint_are_its_own(tmp_path):
    write_checkpoint(tmp_path / "model")
    write_checkpoint(tmp_path / "model" / "original")
    write_checkpoint(tmp_path / "model-b" / "x")
    write_checkpoint(tmp_path / "org" / "model")
    assert sorted(found_below(tmp_path)) == ["model"]
    assert sorted(found_below(tmp_path, 2)) == ["model", "model-b/x", "org/model"]
    assert found_below(tmp_path, 2)["org/model"].uri == f"file://{tmp_path}/org/model"


def test_outputs_are_no_new_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "made")
    (tmp_path / "made" / "quantmill_provenance.json").write_text("{}")
    write_checkpoint(tmp_path / "quantized" / "x")
    write_checkpoint(tmp_path / "quantized-not" / "x")
    excluded = (f"file://{tmp_path}/quantized",)
    assert sorted(found_below(tmp_path, 2, excluded)) == ["quantized-not/x"]


def test_prefix_that_is_not_there_holds_nothing(tmp_path):
    assert found_below(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "a JSON list"),
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "1 are missing"),
        (lambda folder: os.truncate(folder / "model-00002-of-00003.safetensors", 4), "model-00002"),
        (lambda folder: _cut(folder / "model-00003-of-00003.safetensors", 1), "model-00003"),
        (lambda folder: (folder / "model-00001-of-00003.safetensors").write_bytes(b"x" * 99), "model-00001"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    ],
)
def test_damaged_checkpoint_is_told(tmp_path, spoil, told):
    write_checkpoint(tmp_path / "m")
    spoil(tmp_path / "m")
    assert told in str(fault_of(STORE, found_below(tmp_path)["m"]))


def _cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def test_folder_that_went_after_it_was_listed_is_told(tmp_path):
    write_checkpoint(tmp_path / "m")
    found = found_below(tmp_path)["m"]
    shutil.rmtree(tmp_path / "m")
    assert "nothing was found" in str(fault_of(STORE, found))


@settings(max_examples=40)
@given(data=st.data())
def test_checkpoint_is_whole_exactly_when_all_its_files_are_there_in_full(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("tree")
    expected = {}
    for name in data.draw(st.lists(st.sampled_from("abcd"), unique=True), label="checkpoints"):
        num_shards = data.draw(st.integers(1, 4), label="shards")
        write_checkpoint(root / name, num_shards=num_shards)
        needed = sorted(path.name for path in (root / name).iterdir() if path.name != "tokenizer.json")
        gone = data.draw(st.sets(st.sampled_from(needed), max_size=2), label="gone")
        for file in gone:
            (root / name / file).unlink()
        left = [file for file in needed if file.endswith(".safetensors") and file not in gone]
        cut = data.draw(st.sets(st.sampled_from(left), max_size=1), label="cut") if left else set()
        for file in cut:
            _cut(root / name / file, data.draw(st.integers(1, 20), label="bytes"))
        expected[name] = not gone and not cut
    found = found_below(root)
    whole = {name: name in found and fault_of(STORE, found[name]) is None for name in expected}
    assert whole == expected


def test_fingerprint_is_another_when_any_file_is(tmp_path):
    write_checkpoint(tmp_path / "m")
    seen = [found_below(tmp_path)["m"].fingerprint]
    assert found_below(tmp_path)["m"].fingerprint == seen[0]
    for number, path in enumerate(sorted((tmp_path / "m").iterdir())):
        # Replaced by content of the same size, as its etag tells.
        os.utime(path, ns=(number, number))
        seen.append(found_below(tmp_path)["m"].fingerprint)
    (tmp_path / "m" / "notes.txt").write_text("new")
    seen.append(found_below(tmp_path)["m"].fingerprint)
    (tmp_path / "m" / "tokenizer.json").unlink()
    seen.append(found_below(tmp_path)["m"].fingerprint)
    assert len(set(seen)) == len(seen)


def test_checkpoint_settles_a_while_after_its_newest_file(tmp_path):
    write_checkpoint(tmp_path / "m")
    folder = found_below(tmp_path)["m"]
    newest = max(path.stat().st_ctime for path in (tmp_path / "m").iterdir())
    assert settles_in_s(folder, settle_s=600, now_s=newest) == 600
    assert settles_in_s(folder, settle_s=600, now_s=newest + 599) == pytest.approx(1)
    assert settles_in_s(folder, settle_s=600, now_s=newest + 600) == 0
    assert settles_in_s(folder, settle_s=600, now_s=newest + 10_000) == 0


def test_source_files_are_shards_and_side_files(tmp_path):
    write_checkpoint(tmp_path / "m", num_shards=2)
    (tmp_path / "m" / "stray.safetensors").write_bytes(b"not of the index")
    (tmp_path / "m" / "modeling.py").write_text("pass")
    files = source_files(STORE, found_below(tmp_path)["m"])
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(files.objects) == [*shards, "tokenizer.json"]
    sizes = {name: (tmp_path / "m" / name).stat().st_size for name in files.objects}
    assert {name: size for name, (size, _) in files.objects.items()} == sizes


def test_source_files_of_an_index_that_names_what_is_not_there_are_refused(tmp_path):
    write_checkpoint(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00009.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-00009"):
        source_files(STORE, found_below(tmp_path)["m"])
