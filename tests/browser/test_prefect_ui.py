"""A person in front of the Prefect UI: fills in a form and reads what came of the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import PrefectServer
from tests.support.prefect_ui import PrefectUi
from tests.support.tiny_jobs import tiny_source, tiny_text

pytestmark = pytest.mark.slow

_RUN_S = 300


@pytest.fixture
def request_values(tmp_path) -> dict[str, Any]:
    """What a person types, by the titles of the form; the source is the caller's."""
    return {
        "Output": tmp_path / "output",
        "Calibration": tiny_text(tmp_path / "calibration.jsonl", seed=1),
        "Evaluation": tiny_text(tmp_path / "evaluation.jsonl", seed=2),
        "Group size": 32,
        "Sequences": 10,
        "Sequence length": 32,
        "Evaluation sequences": 5,
        "Workers": 1,
        "Threads per worker": 1,
    }


def runs(server: PrefectServer) -> list[dict[str, Any]]:
    with server.client() as client:
        response = client.post("/flow_runs/filter", json={})
    response.raise_for_status()
    return response.json()


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "quantmill_report.json").read_text())


def test_form_refuses_nonsense_and_then_leads_to_a_verdict(
    served: PrefectServer, ui: PrefectUi, request_values, tmp_path
):
    before = runs(served)
    source = tiny_source(tmp_path / "tiny-model")
    ui.open_form("quantize-model")
    ui.fill({**request_values, "Source": source, "Sequences": 0})
    ui.submit()
    assert ui.refusal("Sequences") == "Value must be greater than or equal to 1."
    assert runs(served) == before
    ui.fill({"Sequences": request_values["Sequences"]})
    ui.show("Source")
    ui.picture("form")
    ui.submit()
    run_id = ui.view_run()
    ui.wait_for("tiny-model to W4A16 g32 compressed-tensors", _RUN_S)
    ui.wait_for("^Completed$", _RUN_S)
    (mine,) = [found for found in runs(served) if found["id"] == run_id]
    assert mine["parameters"]["params"]["sequences"] == 10
    ui.open_tab("Artifacts")
    ui.open_artifact("quantize-summary")
    figures = report(tmp_path / "output")["evaluation"]
    ui.wait_for(f"{figures['perplexity_original']:.3f}", _RUN_S)
    ui.picture("verdict")
    ui.back(run_id)
    ui.open_artifact("quantize-blocks")
    ui.wait_for("worst linear", _RUN_S)
    ui.picture("blocks")
