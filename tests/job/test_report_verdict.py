"""The verdict on a run, and what it cost."""

from xml.etree import ElementTree

import pytest

from quantlib.job.report_figures import gpu_hours, headlines, machine_hours
from quantlib.job.report_picture import error_picture
from quantlib.job.report_verdict import concerns, verdict
from tests.support.report_example import example_report


def _changed(part: str, **values):
    report = example_report()
    return {**report, part: {**report[part], **values}}


def test_measured_run_without_concerns_is_good():
    assert concerns(example_report()) == []
    assert verdict(example_report()) == (
        "Good: perplexity 14.374 -> 15.801 (+9.9 %), KL divergence 0.0942 nats a token,"
        " 269.0 MB -> 113.2 MB, 0.0829 CPU-hours."
    )


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (_changed("evaluation", ratio=1.2), "Perplexity grew"),
        (_changed("evaluation", excluded_sequences=2), "Evaluation rows excluded"),
        (_changed("calibration", excluded_rows=[3, 5]), "2 (3, 5)"),
        ({**example_report(), "fallbacks": [{"linear": "a", "kind": "more_damping"}]}, "1 x more_damping"),
    ],
    ids=["ratio", "evaluation rows", "calibration rows", "fallback"],
)
def test_each_concern_is_told_and_asks_for_a_look(report, words):
    (concern,) = concerns(report)
    assert words in concern
    assert verdict(report).startswith("Look at it, 1 concern: perplexity")


def test_run_whose_model_broke_is_to_be_looked_at_and_not_merely_unmeasured():
    empty = dict.fromkeys(("perplexity_original", "perplexity_quantized", "ratio", "kl_divergence"))
    report = _changed("evaluation", **empty, no_figures_because="the model is broken")
    assert concerns(report) == ["The evaluation gave no figures: the model is broken"]
    assert verdict(report).startswith("Look at it")


def test_run_without_evaluation_is_not_measured():
    assert verdict({**example_report(), "evaluation": None}).startswith("Not measured")
    assert verdict({}) == "Not measured, as no evaluation text was given: no figures."


def test_gpu_hours_count_every_worker_from_its_own_start():
    workers = [{"began": -20.0}, {"began": 0.0}, {"began": 1800.0}]
    report = {"device_kind": "cuda NVIDIA H200", "seconds": 3600.0, "timeline": {"workers": workers}}
    assert gpu_hours(report) == pytest.approx(2.5)
    assert machine_hours({**report, "cpu_seconds": 7200.0}) == "2.5 GPU-hours"
    (time,) = (found for found in headlines({**report, "workers": 3}) if found.name == "Time")
    assert time.note == "2.5 GPU-hours, 3 workers"
    assert machine_hours({**report, "device_kind": "cpu-avx512", "cpu_seconds": 7200.0}) == "2 CPU-hours"
    assert machine_hours({}) is None


def test_picture_of_errors_is_a_file_of_its_own_with_a_mark_for_each_block():
    picture = error_picture(example_report(5))
    assert picture is not None
    root = ElementTree.fromstring(picture)
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0] == "block 1: 0.05"
    assert len(titles) == 5


def test_picture_without_measured_errors_is_none():
    report = example_report()
    blocks = [{**block, "relative_error": None} for block in report["blocks"]]
    assert error_picture({**report, "blocks": blocks}) is None
