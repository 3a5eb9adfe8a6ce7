"""Columns of large inputs in the report: as transformers has them, whoever observed which cell."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantlib.inprocess import quantize
from quantlib.job.planner import build_plan
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import tiny_options, tiny_source, tiny_text

pytestmark = pytest.mark.usefixtures("one_thread")


def _with_large_features(folder: Path, family: str) -> Path:
    """Some features of what norms give are much larger than the others."""
    tiny_source(folder, family)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for number, name in enumerate(sorted(n for n in tensors if n.endswith("layernorm.weight"))):
            tensors[name][[number, 20 + number]] *= torch.tensor([40.0, 3.0])
        save_file(tensors, path, {"format": "pt"})
    return folder


def _rows(report) -> dict[str, int | None]:
    return {row["name"]: row["outlier_columns"] for block in report["blocks"] for row in block["linears"]}


def _counted(source: Path, rows_BT: torch.Tensor) -> dict[str, int]:
    """Linear -> columns of its input with any magnitude of 6 or more."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    peaks: dict[str, torch.Tensor] = {}

    def note(name):
        def see(_module, arguments):
            peak_C = arguments[0].abs().flatten(0, -2).amax(0)
            peaks[name] = torch.maximum(peaks.get(name, peak_C), peak_C)

        return see

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(note(name))
    with torch.inference_mode():
        model(rows_BT)
    return {name: int((peak_C >= 6.0).sum()) for name, peak_C in peaks.items()}


def test_report_counts_the_columns_that_transformers_has(tmp_path):
    source = _with_large_features(tmp_path / "large", "llama")
    rules = [{"match": "*.1.mlp.down_proj", "method": "rtn"}]
    options = tiny_options(tmp_path, source=str(source), rules=rules)
    plan, rows = build_plan(options, 1)
    found, wanted = _rows(quantize(options)), _counted(source, rows[plan.calibration_digest].long())
    assert found == {name: wanted[name] for name in found}
    assert "model.layers.1.mlp.down_proj" in found, "rounded, but its input was looked at"
    assert min(found[name] for name in found if name.endswith(("q_proj", "up_proj"))) >= 1
    assert len(set(found.values())) > 2


def test_report_without_data_counts_nothing(tmp_path):
    report = quantize(tiny_options(tmp_path, method="rtn", calibration=None, evaluation=None))
    assert set(_rows(report).values()) == {None}


@pytest.mark.slow
def test_report_counts_the_same_whoever_observed_which_cell(tmp_path):
    source = str(_with_large_features(tmp_path / "large", "mixtral"))
    # Several cells, and passes of input groups.
    given = {"source": source, "sequences": 300, "evaluation": None}
    tiny_options(tmp_path)
    tiny_text(tmp_path / "calibration.jsonl", documents=800)
    one = quantize(tiny_options(tmp_path, output=str(tmp_path / "one"), **given))
    three = convert_on(ThreadCluster(3), tiny_options(tmp_path, output=str(tmp_path / "three"), **given))
    assert _rows(one) == _rows(three)
    experts = {name: count for name, count in _rows(one).items() if ".experts." in name}
    assert experts and max(count for count in experts.values() if count is not None) >= 1
