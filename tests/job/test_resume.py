"""What a second start reuses, checks, replays and does again, and how it says so."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib import cell_store
from quantlib.errors import (
    CheckpointError,
    ChecksumError,
    LeaseError,
    PlanMismatchError,
    TransientStorageError,
)
from quantlib.inprocess import quantize
from quantlib.job import failures, lease
from quantlib.job.activations import newest_checkpoint
from quantlib.job.planner import build_plan
from quantlib.job.stages import Progress
from quantlib.storage import Store, open_store, ranges
from quantlib.storage.local_engine import LocalStore
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source


class _StopError(Exception):
    pass


def _interrupt(options, label: str) -> None:
    """Run a job up to the stage with this label."""

    def stop(progress: Progress) -> None:
        if progress.label == label:
            raise _StopError

    with pytest.raises(_StopError):
        quantize(options, stop)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_source(folder / "deep", num_hidden_layers=6)
    tiny_options(folder)
    return folder


def _options(root: Path, name: str, **changes):
    return tiny_options(root, source=str(root / "deep"), output=str(root / name), **changes)


@pytest.fixture(scope="module")
def undisturbed(root) -> dict[str, tuple[dict[str, str], dict]]:
    """Propagation -> digests and report of a run that nothing disturbed and that kept no activations."""
    found = {}
    for propagation in ("original", "quantized"):
        options = _options(root, f"undisturbed-{propagation}", propagation=propagation, checkpoint_every=0)
        report = quantize(options)
        found[propagation] = (shard_digests(Path(options.output)), report)
    return found


@pytest.mark.parametrize("propagation", ["original", "quantized"])
def test_resume_goes_on_from_the_last_checkpoint_to_the_same_bytes(root, undisturbed, propagation):
    options = _options(root, f"kept-{propagation}", propagation=propagation, checkpoint_every=2)
    _interrupt(options, "block 6/6: capture")
    work = Path(options.output + ".quantmill")
    assert sorted(path.name for path in (work / "activations").glob("*.json")) == ["block-00004.json"]
    report = quantize(options)
    digests, expected = undisturbed[propagation]
    assert shard_digests(Path(options.output)) == digests
    history = report["history"]
    assert history["from_checkpoint"] == 4
    assert history["replayed_blocks"] == [4], "block 4 was finished, and its streams were not kept"
    assert len(history["reused_units"]) == 6, "what stands before the blocks, and five blocks"
    assert report["evaluation"] == expected["evaluation"]
    assert [b["relative_error"] for b in report["blocks"]] == [
        b["relative_error"] for b in expected["blocks"]
    ]
    assert all(block["seconds"]["solve"] > 0 for block in report["blocks"])
    assert not list((work / "activations").rglob("*.*")), "a finished job needs no activations"


def test_resume_without_a_checkpoint_replays_every_finished_block(root, undisturbed):
    options = _options(root, "replayed", checkpoint_every=0)
    _interrupt(options, "block 5/6: solve")
    report = quantize(options)
    assert shard_digests(Path(options.output)) == undisturbed["original"][0]
    assert report["history"]["from_checkpoint"] is None
    assert report["history"]["replayed_blocks"] == [0, 1, 2, 3]


def test_resume_does_a_damaged_unit_again_and_says_why(root, undisturbed):
    options = _options(root, "damaged", checkpoint_every=2)
    _interrupt(options, "head")
    shard = Path(options.output) / "model-00003-of-00008.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (Path(options.output) / "model-00005-of-00008.safetensors").unlink()
    report = quantize(options)
    assert shard_digests(Path(options.output)) == undisturbed["original"][0]
    redone = report["history"]["redone_units"]
    assert set(redone) == {"block-00001", "block-00003"}
    assert "sha256" in redone["block-00001"]
    assert "missing" in redone["block-00003"]
    assert report["history"]["from_checkpoint"] is None, "the checkpoint lies behind what has to be done"


def test_resume_of_a_copied_output_is_not_fooled_by_new_etags(root, undisturbed):
    options = _options(root, "first-machine")
    _interrupt(options, "block 4/6: capture")
    moved = _options(root, "second-machine")
    for suffix in ("", ".quantmill"):
        shutil.copytree(options.output + suffix, moved.output + suffix)
    report = quantize(moved)
    assert shard_digests(Path(moved.output)) == undisturbed["original"][0]
    assert report["history"]["redone_units"] == {}
    assert "block-00002" in report["history"]["reused_units"]


@pytest.mark.parametrize("fault", ["flipped", "missing"])
def test_resume_passes_over_a_checkpoint_that_cannot_be_trusted(root, undisturbed, monkeypatch, fault):
    monkeypatch.setattr(failures, "delay_s", lambda *_: 0.0)
    options = _options(root, f"checkpoint-{fault}", checkpoint_every=3)
    _interrupt(options, "block 5/6: capture")
    cells = sorted(Path(options.output + ".quantmill").glob("activations/*/*.safetensors"))
    content = bytearray(cells[-1].read_bytes())
    content[-3] ^= 64
    if fault == "missing":
        cells[-1].unlink()
    else:
        cells[-1].write_bytes(content)
    report = quantize(options)
    assert shard_digests(Path(options.output)) == undisturbed["original"][0]
    assert len(report["history"]["unusable_checkpoints"]) == 1
    assert report["history"]["from_checkpoint"] is None


def test_resume_with_other_evaluation_text_does_not_take_up_its_streams(root, undisturbed):
    options = _options(root, "other-text", checkpoint_every=2)
    _interrupt(options, "block 5/6: capture")
    changed = dataclasses.replace(options, evaluation=str(root / "calibration.jsonl"))
    report = quantize(changed)
    assert shard_digests(Path(options.output)) == undisturbed["original"][0]
    assert report["history"]["from_checkpoint"] is None


def test_resume_checkpoint_holds_the_streams_themselves(root):
    options = _options(root, "streams", propagation="quantized", checkpoint_every=1)
    _interrupt(options, "block 3/6: capture")
    plan, _ = build_plan(options, 1)
    store = open_store(plan.work)
    checkpoint = newest_checkpoint(store, [plan])
    assert checkpoint is not None
    assert checkpoint.block == 2
    assert {key.split("-")[0] for key in checkpoint.cells} == {"calibration", "evaluation"}
    streams = cell_store.read_cell(store, plan.work, checkpoint, "evaluation-00000")
    assert set(streams) == {"main", "quantized"}
    assert not torch.equal(streams["main"], streams["quantized"])


class _DamagesSecondReads:
    """A store that gives the true bytes of an object once, and zeros from then on."""

    def __init__(self, store):
        self._store = store
        self._given = set()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read_ranges(self, info, ranges):
        parts = self._store.read_ranges(info, ranges)
        is_first = info.uri not in self._given
        self._given.add(info.uri)
        return parts if is_first else [bytes(len(part)) for part in parts]


def test_resume_takes_streams_out_of_the_bytes_whose_digest_was_checked(root):
    options = _options(root, "read-once", checkpoint_every=1)
    _interrupt(options, "block 3/6: capture")
    plan, _ = build_plan(options, 1)
    store = open_store(plan.work)
    checkpoint = newest_checkpoint(store, [plan])
    assert checkpoint is not None
    for key in checkpoint.cells:
        damaging = cast(Store, _DamagesSecondReads(store))
        streams = cell_store.read_cell(damaging, plan.work, checkpoint, key)
        expected = cell_store.read_cell(store, plan.work, checkpoint, key)
        assert all(torch.equal(streams[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 99}, "schema 99"),
        ({"identity": "f" * 64}, "another plan"),
        ({"unit": "block-00099"}, "another unit"),
    ],
)
def test_resume_refuses_a_record_it_does_not_know_by_name(tmp_path, change, words):
    options = tiny_options(tmp_path)
    _interrupt(options, "block 3/3: capture")
    path = tmp_path / "output.quantmill" / "done" / "block-00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PlanMismatchError, match=words) as caught:
        quantize(options)
    assert "block-00000.json" in str(caught.value)
    assert caught.value.before_work


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "linears": [], "excluded_rows": [], "strange": 1}'],
)
def test_resume_refuses_a_record_that_is_none(tmp_path, content):
    options = tiny_options(tmp_path)
    _interrupt(options, "block 3/3: capture")
    (tmp_path / "output.quantmill" / "done" / "block-00000.json").write_text(content)
    with pytest.raises(PlanMismatchError, match=r"block-00000\.json is no record"):
        quantize(options)


def test_resume_refuses_a_record_of_no_unit(tmp_path):
    options = tiny_options(tmp_path)
    _interrupt(options, "block 3/3: capture")
    (tmp_path / "output.quantmill" / "done" / "block-00077.json").write_text("{}")
    with pytest.raises(PlanMismatchError, match=r"block-00077\.json is no record of this job"):
        quantize(options)


def test_resume_keeps_rows_that_were_left_out_before(tmp_path):
    """A token whose embedding is infinite spoils the rows that hold it; they stay out, and are reported."""
    options = tiny_options(tmp_path, sequences=40, checkpoint_every=0)
    text = Path(options.calibration or "")
    text.write_text('{"text": "w1 w2 <s> w3"}\n' + text.read_text())
    for shard in Path(options.source).glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][1, 0] = float("inf")
            save_file(tensors, shard, metadata={"format": "pt"})
    whole = dataclasses.replace(options, output=str(tmp_path / "whole"))
    assert quantize(whole)["calibration"]["excluded_rows"] == [0]
    _interrupt(options, "head")
    report = quantize(options)
    assert report["calibration"]["excluded_rows"] == [0]
    assert shard_digests(Path(options.output)) == shard_digests(Path(whole.output))


def test_resume_second_run_on_the_same_output_is_refused_while_one_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "_LOOK_AGAIN_S", 0.1)
    options, refused = tiny_options(tmp_path), []

    def try_another(progress: Progress) -> None:
        if progress.label == "block 2/3: capture":
            with pytest.raises(LeaseError, match="since") as caught:
                quantize(options)
            refused.append(caught.value)

    report = quantize(options, try_another)
    assert [error.before_work for error in refused] == [True]
    assert report["history"]["retries"] == {}


def test_resume_retries_are_counted_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "delay_s", lambda *_: 0.0)
    chosen, real, failed = random.Random(1), LocalStore.read_ranges, []

    def flaky(self, info, wanted):
        if len(failed) < 5 and chosen.random() < 0.4:
            failed.append(info.uri)
            raise TransientStorageError("the disk is asleep")
        return real(self, info, wanted)

    undisturbed = tiny_options(tmp_path, output=str(tmp_path / "calm"))
    quantize(undisturbed)
    monkeypatch.setattr(LocalStore, "read_ranges", flaky)
    options = tiny_options(tmp_path)
    report = quantize(options)
    assert failed
    assert sum(report["history"]["retries"].values()) >= 1
    assert shard_digests(Path(options.output)) == shard_digests(Path(undisturbed.output))


@pytest.mark.parametrize("size", ["small", "large"])
def test_resume_slices_do_not_change_what_is_written(root, undisturbed, monkeypatch, size):
    monkeypatch.setattr(ranges, "MAX_REQUEST_BYTES", 999 if size == "small" else 1 << 40)
    monkeypatch.setattr(ranges, "MAX_GAP_BYTES", 0 if size == "small" else 1 << 40)
    for propagation in ("original", "quantized"):
        options = _options(root, f"sliced-{size}-{propagation}", propagation=propagation)
        quantize(options)
        assert shard_digests(Path(options.output)) == undisturbed[propagation][0], propagation


def test_resume_checkpoint_of_another_plan_is_refused_by_name(tmp_path):
    options = tiny_options(tmp_path, checkpoint_every=1)
    _interrupt(options, "block 3/3: capture")
    (path,) = (tmp_path / "output.quantmill" / "activations").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "identities": ["f" * 64]}))
    with pytest.raises(PlanMismatchError, match=r"block-00002\.json"):
        quantize(options)


def test_resume_damaged_cell_is_told_by_its_digest(tmp_path):
    options = tiny_options(tmp_path, checkpoint_every=1)
    _interrupt(options, "block 3/3: capture")
    plan, _ = build_plan(options, 1)
    store = open_store(plan.work)
    checkpoint = newest_checkpoint(store, [plan])
    assert checkpoint is not None
    wrong = dataclasses.replace(
        checkpoint, cells={k: ("0" * 64, n) for k, (_, n) in checkpoint.cells.items()}
    )
    with pytest.raises(ChecksumError, match="evaluation-00000"):
        cell_store.read_cell(store, plan.work, wrong, "evaluation-00000")


def test_resume_without_anything_left_to_run_still_reports_the_rows_left_out(tmp_path):
    options = tiny_options(tmp_path, evaluation=None)
    _interrupt(options, "stage")
    for path in (tmp_path / "output.quantmill" / "done").glob("block-*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "excluded_rows": [3, 7]}))
    report = quantize(options)
    assert report["calibration"]["excluded_rows"] == [3, 7]
    assert report["calibration"]["tokens"] == 8 * 32


def test_resume_refuses_a_side_file_replaced_during_the_run(tmp_path):
    options = tiny_options(tmp_path)

    def replace(progress: Progress) -> None:
        if progress.label == "head":
            path = Path(options.source) / "tokenizer.json"
            path.write_text(path.read_text() + "\n")

    with pytest.raises(CheckpointError, match=r"tokenizer\.json was replaced"):
        quantize(options, replace)
    assert not (Path(options.output) / "config.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_resume_refuses_a_checkpoint_that_is_none(tmp_path, content):
    options = tiny_options(tmp_path, checkpoint_every=1)
    _interrupt(options, "block 3/3: capture")
    (path,) = (tmp_path / "output.quantmill" / "activations").glob("*.json")
    path.write_text(content)
    with pytest.raises(PlanMismatchError, match=r"block-00002\.json is no checkpoint"):
        quantize(options)


def test_resume_refuses_a_strange_object_among_the_checkpoints(tmp_path):
    options = tiny_options(tmp_path, checkpoint_every=1)
    _interrupt(options, "block 3/3: capture")
    (tmp_path / "output.quantmill" / "activations" / "notes.json").write_text("{}")
    with pytest.raises(PlanMismatchError, match=r"notes\.json is no checkpoint"):
        quantize(options)


def test_resume_finished_with_other_evaluation_text_points_to_the_command_that_measures(tmp_path):
    options = tiny_options(tmp_path)
    quantize(options)
    with pytest.raises(PlanMismatchError, match="quantmill evaluate"):
        quantize(dataclasses.replace(options, evaluation=options.calibration))
