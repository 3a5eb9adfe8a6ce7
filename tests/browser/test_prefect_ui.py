"""A person in front of the Prefect UI: fills in a form, watches a run, cancels one and retries it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import PrefectServer
from tests.support.prefect_ui import PrefectUi
from tests.support.tiny_jobs import tiny_source, tiny_text

pytestmark = pytest.mark.slow

_RUN_S = 900
_CANCEL_S = 90
# So many that there is time to cancel before the last one is through.
_BLOCKS = 160


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


def test_run_cancelled_and_retried_in_the_page_takes_over_what_was_finished(
    ui: PrefectUi, request_values, tmp_path
):
    source = tiny_source(tmp_path / "deep-model", num_hidden_layers=_BLOCKS)
    ui.open_form("quantize-model")
    ui.fill({**request_values, "Source": source})
    ui.submit()
    run_id = ui.view_run()
    ui.open_tab("Artifacts")
    ui.wait_for(rf"block \d+/{_BLOCKS}: \w+, about .* left", _RUN_S)
    ui.picture("running")
    ui.choose("Cancel", "Cancel Flow Run")
    ui.wait_for("^Cancelled$", _CANCEL_S)
    assert not (tmp_path / "output" / "config.json").exists()
    ui.choose("Retry", "Retry")
    ui.wait_for("^Completed$", _RUN_S)
    reused = report(tmp_path / "output")["history"]["reused_units"]
    assert reused
    ui.back(run_id)
    ui.open_artifact("quantize-summary")
    ui.wait_for(f"Found finished from an earlier start and intact: {len(reused)} units", _RUN_S)
    ui.picture("resumed")
