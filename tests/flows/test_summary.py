"""Rows and words for a conversion in the Prefect UI."""

from flows.summary import block_table, report_uri, summary_markdown
from quantlib.job.block_figures import block_figures
from tests.flows.sample_report import sample_report


def test_block_rows_show_the_worst_linear_of_each_block_in_order():
    blocks = [block_figures(row) for row in sample_report()["blocks"]]
    assert block_table({"s3://out/four": blocks[::-1]}) == [
        {
            "block": 1,
            "relative error": 0.01235,
            "cosine": 0.99991,
            "worst linear": "b",
            "its error": 0.05,
            "damping": 0.1,
            "fallbacks": "1 x rtn",
            "seconds": 3.8,
        },
        {
            "block": 2,
            "relative error": None,
            "cosine": None,
            "worst linear": None,
            "its error": None,
            "damping": None,
            "fallbacks": "none",
            "seconds": 0,
        },
    ]


def test_blocks_of_several_outputs_stand_side_by_side():
    blocks = [block_figures(row) for row in sample_report()["blocks"]]
    rows = block_table({"s3://out/four": blocks, "s3://out/eight/": blocks[:1]})
    assert [(row["block"], row["output"]) for row in rows] == [(1, "four"), (1, "eight"), (2, "four")]


def test_summary_begins_with_the_verdict_then_warnings_then_figures_and_addresses():
    text = summary_markdown(sample_report())
    verdict, warnings, *_ = text.split("\n\n")
    assert verdict.startswith("**Look at it, 1 concern: perplexity 14.370 -> 15.807 (+10.0 %)")
    assert verdict.endswith(", 4.0 MB -> 1.0 MB.**")
    assert warnings.splitlines() == [
        "- Fallbacks: 1 (1 x rtn)",
        "- Found finished from an earlier start and intact: 1 units",
    ]
    assert "tiny: W4A16, group 64, gptq, gptq" in text
    assert "| Time | **1 min 15 s** | 2 workers |" in text
    assert "\n\n- Source, llama: `s3://models/tiny`\n- Output, 1 shards: `s3://models/tiny-w4a16`\n" in text
    assert "\n- Report: `s3://models/tiny-w4a16/quantmill_report.html`\n" in text


def test_summary_of_an_undisturbed_run_has_no_warnings():
    text = summary_markdown(sample_report(fallbacks=[], history={}))
    assert text.startswith("**Good: perplexity")
    assert text.split("\n\n")[1].startswith("tiny: W4A16")


def test_summary_without_figures_says_why():
    text = summary_markdown(sample_report(evaluation=None, fallbacks=[], history={}))
    assert text.startswith("**Not measured, as no evaluation text was given: 4.0 MB -> 1.0 MB.**")


def test_report_uri_bears_a_trailing_slash():
    assert report_uri(sample_report(output="file:///x/")) == "file:///x/quantmill_report.html"
