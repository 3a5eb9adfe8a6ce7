"""Rows and words for a finished conversion."""

from flows.summary import block_rows, report_uri, summary_markdown
from tests.flows.sample_report import sample_report


def test_block_rows_show_the_worst_linear_of_each_block():
    assert block_rows(sample_report()) == [
        {
            "block": 0,
            "relative error": 0.01235,
            "cosine": 0.9999,
            "worst linear error": 0.05,
            "damping": 0.1,
            "fallbacks": 1,
            "seconds": 3.8,
        },
        {
            "block": 1,
            "relative error": None,
            "cosine": None,
            "worst linear error": None,
            "damping": None,
            "fallbacks": 0,
            "seconds": 0,
        },
    ]


def test_summary_gives_verdict_fallbacks_addresses_and_the_report():
    text = summary_markdown(sample_report())
    assert "## tiny: W4A16, group 64, gptq, gptq" in text
    assert "**14.370 -> 15.807**" in text
    assert "(+10.0 %)" in text
    assert "4.00 times smaller" in text
    assert "1 min 15 s" in text
    assert "| Fallbacks | 1 | 1 x rtn |" in text
    assert "| Found finished from an earlier start and intact | 1 units |" in text
    assert "`s3://models/tiny-w4a16/quantmill_report.html`" in text


def test_summary_without_figures_says_why_and_hides_empty_rows():
    text = summary_markdown(sample_report(evaluation=None, fallbacks=[], history={"reused_units": []}))
    assert "not measured" in text
    assert "no evaluation text was given" in text
    assert "| Fallbacks | none |" in text
    assert "earlier start" not in text


def test_report_uri_bears_a_trailing_slash():
    assert report_uri(sample_report(output="file:///x/")) == "file:///x/quantmill_report.html"
