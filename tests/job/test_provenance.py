"""What is recorded of a run, what a replay takes from it, and which difference stops one."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from quantlib.errors import PlanMismatchError, RecipeError
from quantlib.inprocess import quantize
from quantlib.job.options import options_from
from quantlib.job.planner import build_plan
from quantlib.job.provenance import (
    PROVENANCE_NAME,
    build_provenance,
    check_replay,
    read_provenance,
    recorded_options,
    recorded_settings,
    with_replayed_values,
)
from tests.support.provenance_example import PROVENANCE, write_provenance
from tests.support.tiny_jobs import tiny_options, tiny_text


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("provenance")


@pytest.fixture(scope="module")
def plan(root):
    return build_plan(tiny_options(root), 1)[0]


@pytest.fixture(scope="module")
def provenance(plan):
    return build_provenance(plan)


def test_source_objects_are_recorded_with_their_sizes(root, plan, provenance):
    source = provenance["source"]
    assert source["uri"] == f"file://{root}/source"
    recorded = {row["name"]: row["size_bytes"] for row in source["objects"]}
    assert recorded == {name: (root / "source" / name).stat().st_size for name in recorded}
    assert {"tokenizer.json", *(p.name for p in (root / "source").glob("*.safetensors"))} <= recorded.keys()
    assert {row["name"]: row["etag"] for row in source["objects"]} == {
        name: etag for name, (_, etag) in plan.source_objects.items()
    }


def test_options_are_recorded_as_given_and_as_they_were_in_the_end(root, provenance):
    given, effective = provenance["options"]["given"], provenance["options"]["effective"]
    assert (given["source"], effective["source"]) == (str(root / "source"), f"file://{root}/source")
    assert (given["work"], effective["work"]) == (None, f"file://{root}/output.quantmill")
    assert effective["calibration"] == f"file://{root}/calibration.jsonl"
    assert (effective["threads_per_worker"], effective["device"]) == (1, "cpu")
    assert given["group_size"] == effective["group_size"] == 32


def test_values_are_json_and_hold_nothing_that_is_no_option(plan):
    spied = dataclasses.replace(plan, options={**plan.options, "aws_secret_access_key": "hidden"})
    stored = json.dumps(build_provenance(spied), allow_nan=False)
    assert json.loads(stored) == build_provenance(plan)
    assert "hidden" not in stored and "aws_secret" not in stored


def test_a_run_stores_it_beside_its_shards_and_it_can_be_repeated_from_there(root):
    output = root / "first"
    report = quantize(tiny_options(root, output=str(output)))
    stored = read_provenance(str(output / PROVENANCE_NAME), "obstore")
    assert stored["identity"] == report["identity"]
    assert {row["name"]: row["sha256"] for row in stored["shards"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")
    }
    values = {"replay": str(output / PROVENANCE_NAME), "source": str(root / "source"), "output": "elsewhere"}
    again, _ = build_plan(options_from(with_replayed_values(values)), 7)
    check_replay(stored, again)
    assert again.identity() == stored["identity"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 1}, "has schema 1, this version replays 5"),
        ({"schema": ...}, "has schema None"),
        ({"versions": ...}, "versions is missing"),
        ({"machine": {"threads": True}}, "machine.threads is True"),
        ({"source": "s3://b/m"}, "source.uri is missing"),
        ({"calibration": {}}, "calibration.digest is missing"),
        ({"calibration": {"digest": None, "texts": [1]}}, "1 in calibration.texts is no record"),
        ({"source": {**PROVENANCE["source"], "objects": [{"name": "a"}]}}, "lacks a name, size_bytes or"),
        ({"source": {**PROVENANCE["source"], "objects": ["a"]}}, "'a' in source.objects lacks"),
    ],
)
def test_a_file_that_is_no_provenance_is_refused_by_name(tmp_path, changes, said):
    path = write_provenance(tmp_path, **changes)
    with pytest.raises(RecipeError, match=said) as raised:
        read_provenance(str(path), "obstore")
    assert f"file://{path}" in str(raised.value)


def test_a_missing_or_unreadable_file_is_refused_before_work(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    for name, said in (("none.json", "there is no file://.*none.json"), ("list.json", "holds a JSON list")):
        with pytest.raises(RecipeError, match=said) as raised:
            with_replayed_values({"replay": str(tmp_path / name)})
        assert raised.value.before_work


def test_values_without_replay_stay_as_they_are():
    values = {"source": "a", "sequences": None, "bogus": 1, "replay": None}
    assert with_replayed_values(values) == values


def test_recorded_values_are_the_base_and_given_ones_win(tmp_path):
    path = str(write_provenance(tmp_path))
    values = with_replayed_values({"replay": path, "group_size": 128, "workers": 2, "evaluation": None})
    options = options_from(values)
    assert (options.source, options.output, options.work) == (
        "s3://models/tiny",
        "s3://models/tiny-w8",
        "s3://models/tiny-work",
    )
    assert (options.scheme, options.group_size, options.workers) == ("W8A16", 128, 2)
    assert options.rules == ({"match": "*.o_proj", "keep": True},)
    assert (options.threads_per_worker, options.device) == (3, "cpu")
    assert options.evaluation == "s3://texts/held-out.parquet"
    assert (options.worker_labels, options.placement) == (None, None)
    # Where it runs is not repeated.
    assert (options.runner, options.ray_address, options.storage_engine, options.checkpoint_every) == (
        "ray",
        None,
        "obstore",
        None,
    )
    assert options.replay == path


def test_doing_it_twice_changes_nothing(tmp_path):
    given = {"replay": str(write_provenance(tmp_path)), "source": "a", "output": "b", "sequences": 3}
    once = options_from(with_replayed_values(given))
    assert once.work is None, "the recorded work prefix belongs to the recorded output"
    assert options_from(with_replayed_values(dataclasses.asdict(once))) == once


@pytest.mark.parametrize(("given", "missing"), [("source", "output"), ("output", "source")])
def test_one_address_alone_is_refused(tmp_path, given, missing):
    with pytest.raises(
        RecipeError, match=f"both source and output, or neither.*{missing} is missing"
    ) as raised:
        with_replayed_values({"replay": str(write_provenance(tmp_path)), given: "x"})
    assert raised.value.before_work


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replay": 3}, "replay must be text"),
        ({"replay": "a", "storage_engine": "ftp"}, "storage_engine must be"),
    ],
)
def test_wrong_values_are_refused_before_the_file_is_read(values, said):
    with pytest.raises(RecipeError, match=said):
        with_replayed_values(values)


def test_recorded_settings_are_those_of_the_machine():
    assert recorded_settings(PROVENANCE) == {
        "threads": 3,
        "sequences_per_cell": 2,
        "sequences_per_batch": 1,
        "compute_dtype": "float32",
    }
    assert "workers" not in recorded_options(PROVENANCE)


def test_the_same_plan_is_a_replay_whoever_runs_it(root, plan, provenance):
    check_replay(provenance, plan)
    check_replay(provenance, build_plan(tiny_options(root, output="x", workers=3, runner="ray"), 1)[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheme": "W8A16"}, "scheme was W4A16, now W8A16"),
        ({"group_size": 16}, "group_size was 32, now 16"),
        ({"format": "gptq"}, "format_version was .*, now"),
        ({"propagation": "quantized"}, "propagation was original, now quantized"),
        ({"rules": [{"match": "*.down_proj", "keep": True}]}, "rules was .*, now .*down_proj"),
        ({"seed": 1}, "digest of calibration text .*calibration.jsonl was"),
        ({"sequences": 9}, "sequences of calibration text .*calibration.jsonl was 10, now 9"),
        ({"threads_per_worker": 2}, "threads of a worker was 1, now 2"),
    ],
)
def test_other_options_are_named(root, provenance, change, said):
    with pytest.raises(PlanMismatchError, match=said):
        check_replay(provenance, build_plan(tiny_options(root, **change), 1)[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"quantmill": "0.1.0", "torch": "1"}}, "version of torch was .*, now 1;"),
        ({"device_kind": "cuda-sm90"}, "device_kind was cpu-.*, now cuda-sm90;"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype was float32, now bfloat16;"),
        ({"config_digest": "0"}, "config.json of the source was replaced;"),
        ({"sequences_per_cell": 999}, "sequences in a cell was .*, now 999;"),
        ({"sequences_per_batch": 99}, "sequences in a batch was .*, now 99;"),
        ({"kept_linears": ()}, "the layout of the plan differs;"),
        ({"source_objects": {}}, "the source has no .* any more;"),
    ],
)
def test_another_machine_or_library_is_named(plan, provenance, change, said):
    with pytest.raises(PlanMismatchError, match=said) as raised:
        check_replay(provenance, dataclasses.replace(plan, **change))
    assert f"run recorded for {plan.output} cannot be repeated" in str(raised.value)


def test_the_first_difference_is_named_and_no_other(plan, provenance):
    changed = dataclasses.replace(plan, device_kind="cuda-sm90", versions={}, compute_dtype="bfloat16")
    with pytest.raises(PlanMismatchError, match="version of quantmill") as raised:
        check_replay(provenance, changed)
    assert "device_kind" not in str(raised.value)


@pytest.fixture
def copy(root, plan, tmp_path) -> Path:
    """A folder with the same source and texts."""
    for name in ("source", "calibration.jsonl", "evaluation.jsonl"):
        source = root / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def test_a_replaced_source_object_is_refused_at_the_recorded_address(copy):
    before = build_provenance(build_plan(tiny_options(copy), 1)[0])
    shard = sorted((copy / "source").glob("*.safetensors"))[0]
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(PlanMismatchError, match=f"{shard.name} of the source was replaced .*etag was"):
        check_replay(before, build_plan(tiny_options(copy), 1)[0])
    (copy / "source" / "merges.txt").write_text("x")
    (copy / "source" / "tokenizer_config.json").unlink()
    with pytest.raises(PlanMismatchError, match="the source had no merges.txt"):
        check_replay(before, build_plan(tiny_options(copy), 1)[0])


def test_a_copy_of_the_source_elsewhere_is_accepted_although_its_etags_differ(copy, plan, provenance):
    elsewhere, _ = build_plan(tiny_options(copy), 1)
    assert elsewhere.identity() != plan.identity()
    check_replay(provenance, elsewhere)


def _with_another_dtype(shard: Path) -> None:
    content = shard.read_bytes()
    assert content.count(b'"BF16"') > 1
    shard.write_bytes(content.replace(b'"BF16"', b'"F16" ', 1))


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("*.safetensors", _with_another_dtype, "have other headers than those of file://"),
        ("tokenizer.json", _longer, r"tokenizer.json of the source had \d+ bytes, now"),
        ("tokenizer.json", Path.unlink, "no tokenizer.json any more"),
    ],
)
def test_another_source_elsewhere_is_refused(copy, provenance, name, change, said):
    options = tiny_options(copy, method="rtn", evaluation=None)
    change(sorted((copy / "source").glob(name))[0])
    elsewhere = build_plan(options, 1)[0]
    with pytest.raises(PlanMismatchError, match=said):
        check_replay(provenance, elsewhere)


def test_evaluation_text_may_be_another_one_but_not_a_changed_one(copy):
    before = build_provenance(build_plan(tiny_options(copy), 1)[0])
    other = tiny_text(copy / "other.jsonl", seed=9)
    check_replay(before, build_plan(tiny_options(copy, evaluation=str(other)), 1)[0])
    check_replay(before, build_plan(tiny_options(copy, evaluation=None), 1)[0])
    tiny_text(copy / "evaluation.jsonl", seed=9)
    with pytest.raises(PlanMismatchError, match="digest of the evaluation tokens was"):
        check_replay(before, build_plan(tiny_options(copy), 1)[0])


def test_a_mix_with_chat_is_recorded_replayed_and_refused_where_it_changed(root, tmp_path, monkeypatch):
    tiny_options(root)
    shutil.copytree(root / "source", tmp_path / "source")
    template = "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    (tmp_path / "source" / "chat_template.jinja").write_text(template)
    tiny_text(tmp_path / "calibration.jsonl", seed=1)
    tiny_text(tmp_path / "evaluation.jsonl", seed=2)
    texts = [json.loads(line)["text"] for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    chats = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    # The calibration is named from here, and run from elsewhere.
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "output"
    report = quantize(tiny_options(tmp_path, calibration="calibration.jsonl=0.7, chat.jsonl=0.3"))
    stored = read_provenance(str(output / PROVENANCE_NAME), "obstore")
    rows = stored["calibration"]["texts"]
    assert [(row["uri"], row["weight"], row["sequences"], row["column"]) for row in rows] == [
        (f"file://{tmp_path}/calibration.jsonl", "0.7", 7, "text"),
        (f"file://{tmp_path}/chat.jsonl", "0.3", 3, "messages"),
    ]
    assert rows[0]["template_digest"] is None
    assert rows[1]["template_digest"] == hashlib.sha256(template.encode()).hexdigest()
    assert report["calibration"]["texts"] == rows
    values = {"replay": str(output / PROVENANCE_NAME), "source": str(tmp_path / "source"), "output": "x"}
    monkeypatch.chdir(root)
    again, _ = build_plan(options_from(with_replayed_values(values)), 1)
    assert again.identity() == report["identity"]
    values["calibration"] = f"{tmp_path}/calibration.jsonl=0.6, {tmp_path}/chat.jsonl=0.4"
    with pytest.raises(PlanMismatchError, match=r"weight of calibration text .*l was 0\.7, now 0\.6"):
        build_plan(options_from(with_replayed_values(values)), 1)
