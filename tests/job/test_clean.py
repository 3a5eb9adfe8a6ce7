"""What clean removes in each state of a job, and everything that it leaves alone."""

import dataclasses
import json
from pathlib import Path

import pytest

from quantlib.__main__ import main
from quantlib.errors import CheckpointError, LeaseError, PlanMismatchError
from quantlib.inprocess import quantize
from quantlib.job import lease
from quantlib.job.clean import clean_work, format_cleaned
from quantlib.job.lease import Lease
from quantlib.job.manifest import read_plan
from quantlib.job.plan import Plan, plan_to_json
from quantlib.job.planner import build_plan
from quantlib.storage import open_store
from tests.support.tiny_jobs import shard_digests, tiny_options

STORE = open_store("file:///")
PART = ".model-00001-of-00005.safetensors.00ff.quantmill-part"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("clean")


@pytest.fixture
def output(root, tmp_path) -> Path:
    """A finished output, with its work prefix beside it."""
    output = tmp_path / "output"
    quantize(tiny_options(root, output=str(output), method="rtn"))
    return output


@pytest.fixture
def work(output) -> Path:
    return output.parent / "output.quantmill"


@pytest.fixture
def unfinished(output, work) -> Path:
    """The same, as if it had been killed while it published: two units to go, one shard half uploaded."""
    for name in ("config.json", "model.safetensors.index.json"):
        (output / name).unlink()
    for record in sorted((work / "done").iterdir())[:2]:
        record.unlink()
    (output / PART).write_bytes(b"half")
    (work / "tokens" / PART).write_bytes(b"half")
    activations = work / "activations" / "block-00001"
    activations.mkdir(parents=True)
    (activations / "calibration-00000.safetensors").write_bytes(b"x" * 10)
    (work / "activations" / "block-00001.json").write_bytes(b"{}")
    return output


def files(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without(found: dict[str, bytes], *endings: str) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if not name.endswith(endings)}


def besides_the_lease(*folders: Path) -> dict[str, bytes]:
    """All files but those of a lease that is being renewed."""
    paths = [path for folder in folders for path in folder.rglob("*") if "lease.json" not in path.name]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def test_finished_output_loses_its_work_prefix_and_nothing_else(output, work):
    before, kept = files(work), files(output)
    cleaned = clean_work(str(output))
    assert files(work) == {}
    assert files(output) == kept
    removed = without(before, "lease.json")
    assert (cleaned.state, cleaned.uploads, cleaned.strange) == ("finished", 0, ())
    assert (cleaned.objects, cleaned.size_bytes) == (len(removed), sum(map(len, removed.values())))
    assert {"plan.json", "done/block-00000.json"} <= removed.keys()


def test_discard_does_not_touch_a_finished_output(output, work):
    kept = files(output)
    assert clean_work(str(output), discard=True).state == "finished"
    assert files(output) == kept and files(work) == {}


def test_unfinished_job_loses_uploads_only_and_goes_on(root, unfinished, work):
    kept, shards = files(work), shard_digests(unfinished)
    done = sorted(name for name in kept if name.startswith("done/"))
    cleaned = clean_work(str(unfinished))
    assert (cleaned.state, cleaned.uploads, cleaned.objects) == ("unfinished", 2, 0)
    assert files(work) == without(kept, ".quantmill-part", "lease.json")
    assert PART not in files(unfinished)
    (work / "activations" / "block-00001.json").unlink()
    report = quantize(tiny_options(root, output=str(unfinished), method="rtn"))
    assert len(done) == len(report["shards"]) - 2 > 0
    assert shard_digests(unfinished) == shards


def test_discard_removes_shards_and_records_and_the_job_may_start_over(root, unfinished, work):
    (work / "devices").mkdir()
    (work / "devices" / "cuda-sm80-nvidia-a100.json").write_bytes(b"{}")
    before = {**files(unfinished), **files(work)}
    cleaned = clean_work(str(unfinished), discard=True)
    assert files(unfinished) == {} and files(work) == {}
    removed = without(before, ".quantmill-part", "lease.json")
    assert (cleaned.state, cleaned.uploads) == ("discarded", 2)
    assert (cleaned.objects, cleaned.size_bytes) == (len(removed), sum(map(len, removed.values())))
    # Another job may take the place.
    quantize(tiny_options(root, output=str(unfinished), method="rtn", scheme="W8A16"))


def test_side_file_of_the_gptq_format_goes_too(root, tmp_path):
    output = tmp_path / "gptq"
    quantize(tiny_options(root, output=str(output), method="rtn", format="gptq"))
    (output / "config.json").unlink()
    clean_work(str(output), discard=True)
    assert files(output) == {}


def test_objects_of_something_else_stay_and_are_told(unfinished, work):
    strange = {
        unfinished / "notes.md": "mine",
        unfinished / "model-00001-of-00099.safetensors": "mine",
        work / "done" / "block-99999.json": "mine",
        work / "tokens" / "notes.npy": "mine",
        work / "plan.json.bak": "mine",
    }
    for path, text in strange.items():
        path.write_text(text)
    cleaned = clean_work(str(unfinished), discard=True)
    assert set(cleaned.strange) == {f"file://{path}" for path in strange}
    assert all(path.read_text() == text for path, text in strange.items())
    assert len(files(unfinished)) + len(files(work)) == len(strange)
    assert "5 object(s) of something else stay, such as file://" in format_cleaned(cleaned)


def test_live_lease_is_respected_and_its_holder_named(unfinished, work, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "_LOOK_AGAIN_S", 0.1)
    with Lease.acquire(STORE, f"file://{work}") as held:
        before = besides_the_lease(unfinished, work)
        with pytest.raises(LeaseError, match=f"held by run {held.run_id} .* since ") as raised:
            clean_work(str(unfinished), discard=True)
        assert raised.value.before_work
        assert besides_the_lease(unfinished, work) == before
        held.check()


def _rewrite_plan(work: Path, **changes) -> Plan:
    plan = read_plan(STORE, f"file://{work}")
    assert plan is not None
    changed = dataclasses.replace(plan, **changes)
    (work / "plan.json").write_text(json.dumps(plan_to_json(changed)))
    return changed


def test_output_of_another_job_is_refused_and_kept(root, output, work):
    _rewrite_plan(work, format_version="another")
    before = {**files(output), **without(files(work), "lease.json")}
    with pytest.raises(PlanMismatchError, match="holds another checkpoint than the one that"):
        clean_work(str(output), discard=True)
    assert {**files(output), **without(files(work), "lease.json")} == before


def test_work_prefix_named_for_another_output_is_refused(root, unfinished, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model-00001-of-00005.safetensors").write_text("mine")
    with pytest.raises(PlanMismatchError, match=f"holds the job for file://{unfinished}, not for file://"):
        clean_work(str(other), work=f"{unfinished}.quantmill", discard=True)
    assert (other / "model-00001-of-00005.safetensors").read_text() == "mine"


def test_work_prefix_that_was_named_is_found(root, tmp_path):
    options = tiny_options(root, output=str(tmp_path / "o"), work=str(tmp_path / "w"), method="rtn")
    quantize(options)
    assert clean_work(str(tmp_path / "o"), work=str(tmp_path / "w")).state == "finished"
    assert files(tmp_path / "w") == {}


def test_damaged_report_stops_before_anything_is_removed(output, work):
    (output / "quantmill_report.json").write_text("{")
    before = without(files(work), "lease.json")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        clean_work(str(output))
    assert without(files(work), "lease.json") == before


def test_nothing_to_clean_is_refused_and_creates_nothing(output, tmp_path):
    clean_work(str(output))
    kept = files(tmp_path)
    for address in (output, tmp_path / "void"):
        with pytest.raises(PlanMismatchError, match="there is nothing to clean"):
            clean_work(str(address))
    assert files(tmp_path) == kept
    assert not (tmp_path / "void").exists() and not (tmp_path / "void.quantmill").exists()


def test_uploads_that_outlived_their_work_prefix_are_aborted(output):
    clean_work(str(output))
    kept = files(output)
    (output / PART).write_bytes(b"half")
    cleaned = clean_work(str(output))
    assert (cleaned.state, cleaned.uploads, cleaned.objects) == ("none", 1, 0)
    assert files(output) == kept


def test_folder_above_an_output_is_refused(output, tmp_path):
    (output / PART).write_bytes(b"half")
    with pytest.raises(PlanMismatchError, match="it holds folders, such as that of file://"):
        clean_work(str(tmp_path))
    assert (output / PART).exists()


def test_one_line_says_what_was_done(unfinished):
    line = format_cleaned(clean_work(str(unfinished)))
    assert line == (
        f"file://{unfinished}: 2 unfinished upload(s) aborted, 0 object(s) of 0 bytes removed;"
        " the job stays as it is: quantize continues it, --discard removes it"
    )


def test_command_prints_one_line_or_json_and_refuses_with_2(output, capsys):
    assert main(["clean", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"file://{output}: 0 unfinished upload(s) aborted, ") and shown.count("\n") == 1
    assert main(["clean", str(output)]) == 2
    assert capsys.readouterr().err.startswith("quantmill: error: there is nothing to clean")
    (output / PART).write_bytes(b"half")
    assert main(["clean", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": f"file://{output}",
        "state": "none",
        "uploads": 1,
        "objects": 0,
        "size_bytes": 0,
        "strange": [],
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_job_in_s3_is_cleaned_with_its_uploads(root, s3_environment, engine):
    output = s3_environment.uri(f"clean-{engine}/output")
    options = tiny_options(root, output=output, method="rtn", storage_engine=engine)
    quantize(options)
    s3_environment.client.create_multipart_upload(
        Bucket=output.split("/")[2], Key=f"clean-{engine}/output/model-00001-of-00005.safetensors"
    )
    assert len(s3_environment.open_uploads(f"clean-{engine}/")) == 1
    kept = s3_environment.keys(f"clean-{engine}/output/")
    cleaned = clean_work(output, storage_engine=engine)
    assert (cleaned.state, cleaned.uploads) == ("finished", 1)
    assert s3_environment.open_uploads(f"clean-{engine}/") == []
    assert s3_environment.keys(f"clean-{engine}/") == kept
    store = open_store(output, engine)
    store.delete(f"{output}/config.json")
    plan, _ = build_plan(options, 1)
    store.write(f"{output}.quantmill/plan.json", json.dumps(plan_to_json(plan)).encode())
    assert clean_work(output, storage_engine=engine, discard=True).state == "discarded"
    assert s3_environment.keys(f"clean-{engine}/") == []
