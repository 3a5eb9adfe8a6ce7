"""One kind of device for a job, unless GPUs may be mixed; then everything says which took part."""

import json
from pathlib import Path

import pytest
import torch

from quantlib.block_runner import BlockRunner
from quantlib.cholesky_check import CholeskyCheck
from quantlib.errors import PlanMismatchError
from quantlib.inprocess import quantize
from quantlib.job.bundle import bundle_of
from quantlib.job.manifest import device_kinds, record_device_kind
from quantlib.job.plan import Plan
from quantlib.job.planner import begin, prepare
from quantlib.job.provenance import PROVENANCE_NAME
from quantlib.job.report_text import format_report
from quantlib.machine import device_kind, may_share
from quantlib.storage import open_store
from tests.support.tiny_jobs import tiny_options

H100 = "cuda-sm90-nvidia-h100-80gb-hbm3"
A100 = "cuda-sm80-nvidia-a100-sxm4-80gb"
STORE = open_store("file:///")


@pytest.fixture
def gpu(monkeypatch):
    """Makes PyTorch tell of a GPU that is not there; nothing may compute on it."""

    def pretend(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    return {
        H100: lambda: pretend("NVIDIA H100 80GB HBM3", (9, 0)),
        A100: lambda: pretend("NVIDIA A100-SXM4-80GB", (8, 0)),
    }


def test_kind_names_architecture_and_model(gpu):
    for kind, pretend in gpu.items():
        pretend()
        assert device_kind(None) == device_kind("cuda") == kind
    assert device_kind("cpu").startswith("cpu-")


@pytest.mark.parametrize("mixed", [False, True])
def test_only_gpus_may_share_and_only_where_they_may_be_mixed(mixed):
    assert may_share(H100, A100, mixed_gpus=mixed) == mixed
    assert may_share("cpu-avx2", "cpu-avx2", mixed_gpus=mixed)
    for other in (H100, "cpu-avx512"):
        assert not may_share("cpu-avx2", other, mixed_gpus=mixed)


def _started_on(gpu, kind: str, root: Path):
    """A job that was planned on this kind of GPU, and its options."""
    options = tiny_options(root, device="cuda", method="rtn", evaluation=None)
    gpu[kind]()
    prepared = prepare(options, 1)
    begin([prepared])
    return options, prepared.plan


def test_resume_on_another_gpu_is_refused_unless_gpus_may_be_mixed(tmp_path, gpu):
    options, plan = _started_on(gpu, H100, tmp_path)
    gpu[A100]()
    with pytest.raises(PlanMismatchError, match=f"device_kind was {H100}, now {A100}, which mixed_gpus"):
        prepare(options, 1)
    mixed = tiny_options(tmp_path, device="cuda", method="rtn", evaluation=None, mixed_gpus=True)
    again = prepare(mixed, 1).plan
    assert (again.device_kind, again.identity()) == (H100, plan.identity())


def test_worker_on_another_gpu_takes_part_only_where_they_may_be_mixed_and_is_noted(tmp_path, gpu):
    options, plan = _started_on(gpu, H100, tmp_path)
    BlockRunner().open(bundle_of([plan]))
    assert device_kinds(STORE, plan) == [H100]
    gpu[A100]()
    with pytest.raises(PlanMismatchError, match=f"planned for {H100}, this worker has {A100}.*mixed_gpus"):
        BlockRunner().open(bundle_of([plan]))
    mixed = tiny_options(tmp_path, device="cuda", method="rtn", evaluation=None, mixed_gpus=True)
    worker = BlockRunner()
    worker.open(bundle_of([prepare(mixed, 1).plan]))
    assert worker.telemetry()["device_kinds"] == [A100, H100]
    # The H100 would do again, but some of the work is an A100's now.
    gpu[H100]()
    with pytest.raises(PlanMismatchError, match=f"several kinds of device took part .*{A100}, {H100}"):
        prepare(options, 1)


def _begun(root: Path, **others) -> Plan:
    prepared = prepare(tiny_options(root, evaluation=None, **others), 1)
    begin([prepared])
    return prepared.plan


def test_worker_on_a_gpu_checks_the_largest_factor_before_work_and_tells(tmp_path, gpu):
    gpu[H100]()
    asked = []

    def check(columns: int, device: torch.device) -> CholeskyCheck:
        asked.append((columns, device.type))
        return CholeskyCheck(way="blocked", columns=columns, problems={"library": "3 wrong entries"})

    worker = BlockRunner(check_choleskys=check)
    worker.open(bundle_of([_begun(tmp_path, device="cuda")]))
    assert asked == [(96, "cuda")]
    assert worker.telemetry()["cholesky_check"] == {
        "way": "blocked",
        "columns": 96,
        "problems": {"library": "3 wrong entries"},
    }


def test_worker_without_a_factor_to_make_on_a_gpu_checks_none(tmp_path, gpu):
    def check(columns: int, device: torch.device) -> CholeskyCheck:
        raise AssertionError("nobody needs it")

    plans = [_begun(tmp_path)]
    gpu[H100]()
    plans.append(_begun(tmp_path, device="cuda", method="rtn", output=str(tmp_path / "rounded")))
    for plan in plans:
        worker = BlockRunner(check_choleskys=check)
        worker.open(bundle_of([plan]))
        assert worker.telemetry()["cholesky_check"] is None


def test_worker_on_another_cpu_is_refused_in_any_case(tmp_path, monkeypatch):
    options = tiny_options(tmp_path, method="rtn", evaluation=None, mixed_gpus=True)
    plan = prepare(options, 1).plan
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    with pytest.raises(PlanMismatchError, match="this worker has cpu-avx1024; use one kind") as caught:
        BlockRunner().open(bundle_of([plan]))
    assert "mixed_gpus" not in str(caught.value)


def test_report_and_provenance_say_which_kinds_took_part(tmp_path):
    options = tiny_options(tmp_path, method="rtn", evaluation=None, mixed_gpus=True)
    prepared = prepare(options, 1)
    begin([prepared])
    record_device_kind(STORE, prepared.plan, "another-kind")
    report = quantize(options)
    kinds = sorted(["another-kind", prepared.plan.device_kind])
    assert report["device_kinds"] == kinds
    assert f"several kinds of device took part, and the bytes depend on it: {', '.join(kinds)}" in (
        format_report(report)
    )
    provenance = Path(options.output) / PROVENANCE_NAME
    assert json.loads(provenance.read_text())["machine"]["device_kinds"] == kinds
    again = {"method": "rtn", "evaluation": None, "replay": str(provenance), "output": str(tmp_path / "b")}
    with pytest.raises(PlanMismatchError, match=r"kinds of device \(mixed_gpus\) was .*another-kind"):
        quantize(tiny_options(tmp_path, **again))
    assert quantize(tiny_options(tmp_path, mixed_gpus=True, **again))["device_kinds"] == [kinds[1]]


def test_report_of_one_kind_names_it_and_no_note_is_kept(tmp_path):
    options = tiny_options(tmp_path, method="rtn", evaluation=None)
    report = quantize(options)
    assert report["device_kinds"] == [report["device_kind"]]
    assert "kinds of device" not in format_report(report)
    assert not (tmp_path / "output.quantmill" / "devices").exists()
