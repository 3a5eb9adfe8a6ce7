"""Staged outputs: what is there and what is not, who reads them, and how they are published in the end."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from quantlib.__main__ import main
from quantlib.checkpoint.compare import compare_checkpoints
from quantlib.checkpoint.index import CONFIG_NAME, STAGED_NAME
from quantlib.checkpoint.inspect import inspect_checkpoint
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import (
    CheckpointError,
    GateError,
    LeaseError,
    PlanMismatchError,
    RecipeError,
    StorageError,
)
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize, quantize_all
from quantlib.job.clean import clean_work
from quantlib.job.command_hooks import CommandHooks
from quantlib.job.gates import GATE_OPTIONS
from quantlib.job.lease import Lease
from quantlib.job.options import JobOptions
from quantlib.job.publish_later import publish_later
from quantlib.job.several_formats import requests_of_formats
from quantlib.job.stages import Progress
from quantlib.storage import open_store
from quantlib.storage.local_engine import LocalStore
from tests.support.tiny_jobs import gguf_source, shard_digests, tiny_options, tiny_source

STORE = open_store("file:///")
# Stages that compute nothing.
PUBLISHING = {"plan", "check finished units", "keep the report", "hook", "publish", "done"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Source and texts."""
    folder = tmp_path_factory.mktemp("publishing")
    tiny_options(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root) -> Path:
    """An output that was held to nothing."""
    quantize(_options(root, root / "whole"))
    return root / "whole"


@pytest.fixture(scope="module")
def once_staged(root) -> Path:
    """A staged output; it is copied by whoever changes it."""
    report = quantize(_options(root, root / "kept" / "output", publish="staged"))
    assert report["publication"]["state"] == "staged"
    return root / "kept" / "output"


@pytest.fixture
def staged(once_staged) -> Path:
    """One for each test, always at the same address, which its plan names."""
    kept = once_staged.parent.parent / "as staged"
    if not kept.exists():
        shutil.copytree(once_staged.parent, kept)
    shutil.rmtree(once_staged.parent)
    shutil.copytree(kept, once_staged.parent)
    return once_staged


def _options(root: Path, output: Path, **given) -> JobOptions:
    return tiny_options(root, output=str(output), **given)


def _publish(output: Path, **wishes) -> dict:
    return publish_later(
        str(output), work=None, storage_engine="obstore", wishes=wishes, hooks=CommandHooks()
    )


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _labels(options: JobOptions) -> set[str]:
    labels: list[str] = []
    quantize(options, lambda progress: labels.append(progress.label))
    return set(labels)


def _assert_published(output: Path, whole: Path) -> None:
    """As if it had been held to nothing; what tells of the run itself is another run's."""
    assert _names(output) == _names(whole)
    for path in sorted(whole.iterdir()):
        if not path.name.startswith("quantmill_"):
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert verify_checkpoint(STORE, f"file://{output}").findings == ()


def _assert_staged(output: Path, whole: Path) -> None:
    assert shard_digests(output) == shard_digests(whole)
    assert _names(output) == {*shard_digests(whole), STAGED_NAME}


def test_a_run_that_breaks_a_gate_leaves_shards_and_records_and_publishes_once_the_limit_is_higher(
    root, whole, tmp_path
):
    options = _options(root, tmp_path / "output", max_kl=0.0, max_block_error=9.0)
    with pytest.raises(GateError, match="staged, not published: max_kl allows 0.0, found 0.") as caught:
        quantize(options)
    assert not caught.value.before_work
    assert [gate["gate"] for gate in caught.value.facts["gates"]] == ["max_kl"]
    _assert_staged(tmp_path / "output", whole)
    assert len(list((tmp_path / "output.quantmill" / "done").iterdir())) == 5
    with pytest.raises(GateError, match="max_kl allows 0.0"):
        quantize(options)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").glob("*.safetensors")}
    higher = dataclasses.replace(options, max_kl=9.0)
    assert _labels(higher) == PUBLISHING - {"hook"}
    assert {path: path.stat().st_mtime_ns for path in written} == written
    _assert_published(tmp_path / "output", whole)
    report = json.loads((tmp_path / "output" / "quantmill_report.json").read_text())
    assert report["publication"]["state"] == "published"
    assert [(g["gate"], g["limit"], g["passed"]) for g in report["publication"]["gates"]] == [
        ("max_kl", 9.0, True),
        ("max_block_error", 9.0, True),
    ]
    assert report["options"]["max_kl"] == 9.0
    assert "max_block_error" in (tmp_path / "output" / "quantmill_report.html").read_text()
    assert quantize(options) == report, "what is published stays so"


@pytest.mark.parametrize("gate", [gate for gate in GATE_OPTIONS if gate != "max_fallback_share"])
def test_each_gate_passes_at_its_figure_and_breaks_below_it(staged, whole, gate):
    report = json.loads((whole / "quantmill_report.json").read_text())
    figure = {
        "max_perplexity_ratio": report["evaluation"]["ratio"],
        "max_kl": report["evaluation"]["kl_divergence"],
        "max_block_error": max(block["relative_error"] for block in report["blocks"]),
    }[gate]
    with pytest.raises(GateError, match=f"{gate} allows"):
        _publish(staged, **{gate: math.nextafter(figure, 0)})
    _assert_staged(staged, whole)
    assert _publish(staged, **{gate: figure})["publication"]["gates"] == [
        {"gate": gate, "limit": figure, "figure": figure, "passed": True}
    ]
    _assert_published(staged, whole)


def test_the_share_of_fallbacks_is_of_the_quantized_linears(root, tmp_path):
    # Eight tokens choose 2 of 4 experts in three blocks: some expert is left without any.
    source = tiny_source(tmp_path / "experts", "qwen3_moe", moe_intermediate_size=32, mlp_only_layers=[])
    given = {"source": str(source), "sequences": 1, "sequence_length": 8, "max_fallback_share": 0}
    options = _options(root, tmp_path / "output", evaluation=None, expert_shrinkage=0, **given)
    with pytest.raises(GateError, match="max_fallback_share allows 0, found"):
        quantize(options)
    staged = json.loads((tmp_path / "output.quantmill" / "staged" / "quantmill_report.json").read_text())
    linears = [linear for block in staged["blocks"] for linear in block["linears"]]
    share = sum(1 for linear in linears if linear["fallback"]) / len(linears)
    assert 0 < share < 1
    assert _publish(tmp_path / "output", max_fallback_share=share)["publication"]["state"] == "published"


def test_readers_say_that_an_output_is_staged(root, staged, tmp_path):
    uri = f"file://{staged}"
    text = str(root / "evaluation.jsonl")
    readers = {
        "verify": lambda: verify_checkpoint(STORE, uri),
        "inspect": lambda: inspect_checkpoint(STORE, uri),
        "evaluate": lambda: evaluate_checkpoint(
            uri, text, text_column=None, sequences=2, sequence_length=16, threads=1, device="cpu"
        ),
        "convert": lambda: quantize(_options(root, tmp_path / "next", source=str(staged))),
    }
    for name, read in readers.items():
        with pytest.raises(CheckpointError, match="is staged, not published") as caught:
            read()
        assert "quantmill publish" in str(caught.value), name
    (finding, *_) = compare_checkpoints(STORE, uri, STORE, f"file://{root}/source").findings
    assert "is staged, not published" in finding


def test_a_staged_gguf_file_is_no_checkpoint_either(root, tmp_path):
    source = gguf_source(tmp_path / "lettered", num_hidden_layers=2)
    given = {"source": str(source), "format": "gguf", "method": "rtn", "evaluation": None}
    quantize(_options(root, tmp_path / "output", publish="staged", **given))
    for read in (verify_checkpoint, inspect_checkpoint):
        with pytest.raises(CheckpointError, match="is staged, not published"):
            read(STORE, f"file://{tmp_path}/output")
    _publish(tmp_path / "output")
    assert verify_checkpoint(STORE, f"file://{tmp_path}/output").findings == ()


def test_publishing_later_needs_no_source_and_keeps_what_was_staged(root, whole, tmp_path, capsys):
    shutil.copytree(root / "source", tmp_path / "source")
    gone = str(tmp_path / "source")
    quantize(_options(root, tmp_path / "output", source=gone, publish="staged", max_kl=9))
    _assert_staged(tmp_path / "output", whole)
    shutil.rmtree(tmp_path / "source")
    assert main(["report", str(tmp_path / "output")]) == 0
    assert f"Staged, not published: quantmill publish file://{tmp_path}/output" in capsys.readouterr().out
    assert main(["publish", str(tmp_path / "output"), "--max-kl", "0"]) == 1
    assert "max_kl allows 0.0, found" in capsys.readouterr().err
    assert main(["publish", str(tmp_path / "output"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["publication"]["gates"][0]["limit"] == 9, "that of the run"
    _assert_published(tmp_path / "output", whole)
    assert main(["publish", str(tmp_path / "output")]) == 2
    assert "is published already" in capsys.readouterr().err


def test_a_staged_run_says_so_and_ends_well(root, tmp_path, capsys):
    words = ["quantize", str(root / "source"), str(tmp_path / "output"), "--method", "rtn", "--group-size=32"]
    assert main([*words, "--publish", "staged", "--runner", "inprocess"]) == 0
    told = capsys.readouterr().out
    assert f"Staged, not published: quantmill publish file://{tmp_path}/output publishes it" in told
    assert "Report:" not in told


@pytest.mark.parametrize(
    ("wishes", "kind", "words"),
    [
        ({"hook": "@smoke"}, RecipeError, "is not among those that QUANTMILL_HOOKS names"),
        ({"max_kl": 1.0}, RecipeError, "max_kl 1.0 is a limit on what held-out text measures"),
    ],
)
def test_publishing_later_refuses_what_cannot_be(root, tmp_path, wishes, kind, words):
    quantize(_options(root, tmp_path / "output", evaluation=None, method="rtn", publish="staged"))
    with pytest.raises(kind, match=words) as caught:
        _publish(tmp_path / "output", **wishes)
    assert caught.value.before_work


def test_publishing_later_refuses_what_is_not_staged(root, tmp_path):
    with pytest.raises(PlanMismatchError, match="holds no job") as caught:
        _publish(tmp_path / "output")
    assert caught.value.before_work
    assert not list(tmp_path.iterdir())
    options = _options(root, tmp_path / "output", method="rtn")
    _interrupt(options, "stage")
    with pytest.raises(PlanMismatchError, match="its conversion is not finished"):
        _publish(tmp_path / "output")


def test_publishing_later_waits_for_nobody_who_is_at_work(staged):
    with_lease = Lease.acquire(STORE, f"file://{staged}.quantmill")
    try:
        with pytest.raises(LeaseError, match="since") as caught:
            _publish(staged)
        assert caught.value.before_work
    finally:
        with_lease.release()
    assert _publish(staged)["publication"]["state"] == "published"


def test_a_damaged_shard_is_refused_by_publish_and_made_again_by_quantize(root, staged, whole):
    shard = staged / "model-00003-of-00005.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00005\.safetensors .* sha256"):
        _publish(staged)
    assert not (staged / CONFIG_NAME).exists()
    report = quantize(_options(root, staged))
    assert list(report["history"]["redone_units"]) == ["block-00001"]
    _assert_published(staged, whole)


def test_other_held_out_text_is_measured_before_a_staged_output_is_published(root, staged, whole):
    labels: list[str] = []
    changed = _options(root, staged, evaluation=str(root / "calibration.jsonl"), max_kl=9.0)
    report = quantize(changed, lambda progress: labels.append(progress.label))
    assert "block 1/3: evaluate" in labels and "block 1/3: solve" not in labels
    first = json.loads((whole / "quantmill_report.json").read_text())
    assert report["evaluation"]["digest"] != first["evaluation"]["digest"]
    assert report["publication"]["gates"][0]["figure"] == report["evaluation"]["kl_divergence"]
    assert shard_digests(staged) == shard_digests(whole)


def test_clean_keeps_a_staged_output_unless_it_is_told_otherwise(staged, whole):
    kept = {path: path.read_bytes() for path in staged.parent.rglob("*") if path.is_file()}
    cleaned = clean_work(str(staged))
    assert (cleaned.state, cleaned.objects) == ("staged", 0)
    left = {path: path.read_bytes() for path in staged.parent.rglob("*") if path.is_file()}
    assert left == {path: content for path, content in kept.items() if path.name != "lease.json"}
    _publish(staged)
    cleaned = clean_work(str(staged))
    assert (cleaned.state, cleaned.strange) == ("finished", ())
    _assert_published(staged, whole)


def test_discarding_a_staged_output_leaves_nothing(staged):
    assert clean_work(str(staged), discard=True).state == "discarded"
    assert [path for path in staged.parent.rglob("*") if path.is_file()] == []


class _StopError(Exception):
    pass


def _interrupt(options: JobOptions, label: str) -> None:
    def stop(progress: Progress) -> None:
        if progress.label == label:
            raise _StopError

    with pytest.raises(_StopError):
        quantize(options, stop)


@pytest.mark.parametrize("label", ["stage", "keep the report", "publish"])
def test_a_run_that_ends_between_its_shards_and_its_publication_goes_on_to_the_same(
    root, whole, tmp_path, label
):
    options = _options(root, tmp_path / "output", max_kl=9.0)
    _interrupt(options, label)
    assert not (tmp_path / "output" / CONFIG_NAME).exists()
    labels = _labels(options)
    if label != "stage":
        assert labels == PUBLISHING - {"hook"}
    _assert_published(tmp_path / "output", whole)


@pytest.mark.parametrize("name", ["tokenizer.json", "quantmill_report.html", CONFIG_NAME])
def test_a_publication_that_is_cut_off_is_no_checkpoint_and_goes_on(root, staged, whole, monkeypatch, name):
    write = LocalStore.write

    def failing(self, uri, data):
        if uri == f"file://{staged}/{name}":
            raise StorageError("the disk is gone")
        return write(self, uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", failing)
        with pytest.raises(StorageError, match="the disk is gone"):
            _publish(staged)
    assert not (staged / CONFIG_NAME).exists()
    assert _labels(_options(root, staged)) == PUBLISHING - {"hook"}
    _assert_published(staged, whole)


def test_one_output_that_breaks_its_gate_keeps_no_other_from_being_published(root, tmp_path):
    several = _options(root, tmp_path / "out", format="gptq, compressed-tensors")
    gptq, tensors = requests_of_formats(several)
    strict = dataclasses.replace(gptq, max_kl=0.0)
    with pytest.raises(GateError) as caught:
        quantize_all([strict, tensors])
    told = str(caught.value)
    assert "1 of 2 outputs are staged, not published: gptq (max_kl allows 0.0, found" in told
    assert "published: compressed-tensors" in told
    assert not (tmp_path / "out" / "gptq" / CONFIG_NAME).exists()
    assert (tmp_path / "out" / "compressed-tensors" / CONFIG_NAME).exists()
    labels: list[str] = []
    first, second = quantize_all([gptq, tensors], lambda progress: labels.append(progress.label))
    assert set(labels) == PUBLISHING - {"hook"}
    assert first["publication"]["state"] == second["publication"]["state"] == "published"
    assert verify_checkpoint(STORE, f"file://{tmp_path}/out/gptq").findings == ()


def test_recipes_of_one_reading_are_held_to_limits_of_their_own(root, tmp_path):
    requests = [
        _options(root, tmp_path / "four", max_kl=9.0),
        _options(root, tmp_path / "two", scheme="W2A16_ASYM", max_kl=0.0, propagation="original"),
        _options(root, tmp_path / "eight", scheme="W8A16", max_kl=0.0, publish="staged"),
    ]
    with pytest.raises(GateError, match=r"2 of 3 outputs are staged, not published: two .*, eight .*four"):
        quantize_all(requests)
    assert [(tmp_path / name / CONFIG_NAME).exists() for name in ("four", "two", "eight")] == [
        True,
        False,
        False,
    ]
