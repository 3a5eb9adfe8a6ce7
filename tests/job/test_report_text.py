"""The terminal view of a report."""

import re

import pytest

from quantlib.job.report_text import format_report, format_summary, sparkline
from tests.support.report_example import KINDS, example_report


def test_summary_has_quality_size_and_time_on_a_line_each():
    lines = format_summary(example_report()).splitlines()
    assert lines[0] == "SmolLM2-135M-Instruct: W4A16, group 64, gptq, gptq"
    found = {name: values for name, *values in (re.split(" {2,}", line.strip()) for line in lines[1:])}
    assert found == {
        "Perplexity": ["14.374 -> 15.801", "x 1.0993 (+9.9 %) on 16,352 held-out tokens"],
        "KL divergence": ["0.0942", "nats per token"],
        "Size": ["269.0 MB -> 113.2 MB", "2.38 times smaller"],
        "Time": ["4 min 12 s", "298.4 CPU seconds, 2 workers"],
    }


def test_tables_hold_stages_kinds_and_blocks():
    lines = [line.split() for line in format_report(example_report()).splitlines()]
    assert ["solve", "96.1", "95.2", "210"] in lines
    assert ["2", "0.09", "0.9951", "0.056", "5.3"] in lines
    kinds = {line[0]: line[1] for line in lines if line and line[0] in KINDS}
    assert kinds == {kind: f"{0.05 + 0.001 * position:.4g}" for position, kind in enumerate(KINDS)}


def test_stages_stand_by_cost():
    text = format_report(example_report())
    assert text.index("\nsolve") < text.index("\ncapture")


def test_worst_linears_stand_first():
    text = format_report(example_report())
    assert text.index("model.layers.2.mlp.down_proj") < text.index("model.layers.2.mlp.up_proj")


def test_exceptions_are_listed():
    report = example_report()
    report["fallbacks"] = [{"linear": "model.layers.0.mlp.up_proj", "kind": "rtn", "detail": "0 tokens"}]
    report["calibration"]["excluded_rows"] = [3, 17]
    report["dropped"] = {"lm_head.weight": "equal to the embedding"}
    text = format_report(report)
    assert "fallbacks: 1\n  model.layers.0.mlp.up_proj: rtn, 0 tokens" in text
    assert "calibration rows excluded: 3, 17" in text
    assert "dropped: lm_head.weight: equal to the embedding" in text


def test_tensors_of_the_source_and_texts_are_told():
    text = format_report(example_report())
    assert "quantized  217  212.3 MB  to 4 bits, symmetric, groups of 64\n" in text
    assert "copied       1    0.0 MB  norm, or another part after the blocks (model.norm.weight)\n" in text
    assert "calibration: 19 sequences of s3://texts/chat.parquet, column messages written out by" in text


def test_no_fallback_is_said():
    assert "fallbacks: none" in format_report(example_report())


def test_missing_evaluation_is_said():
    report = example_report()
    report["evaluation"] = None
    assert "no evaluation text was given" in format_summary(report)


@pytest.mark.parametrize("name", sorted(example_report()))
def test_any_part_may_be_missing(name):
    report = example_report()
    del report[name]
    assert format_report(report)
    assert format_report(example_report() | {name: None})


def test_sparkline_goes_from_lowest_to_highest_level():
    assert sparkline([0.0, None, 0.5, 1.0]) == "\u2581 \u2585\u2588"
    assert sparkline([0.0, 0.0]) == "\u2581\u2581"
    assert sparkline([]) == ""
