"""Tokens of routed experts in the views of a report."""

from typing import Any

from quantlib.job.report_experts import loads_of, sentence, tokens_by_rank
from quantlib.job.report_html import render_html
from quantlib.job.report_text import format_report
from tests.support.report_example import example_report


def _with_experts(tokens: list[list[int]]) -> dict[str, Any]:
    """A report whose blocks have experts of so many tokens each."""
    report = example_report(num_blocks=len(tokens))
    for index, block in enumerate(report["blocks"]):
        template = block["linears"][0]
        for expert, routed in enumerate(tokens[index]):
            for kind, shared in (("gate_proj", 64.0), ("down_proj", 200.0)):
                name = f"model.layers.{index}.mlp.experts.{expert}.{kind}"
                row = {"name": name, "tokens": routed, "shared_tokens": shared, "dropped_tokens": 0}
                block["linears"].append({**template, **row})
    return report


def test_experts_are_ranked_by_their_tokens_in_every_block():
    report = _with_experts([[500, 0, 100, 300], [], [7, 9]])
    assert [[load.tokens for load in experts] for experts in loads_of(report)] == [
        [0, 100, 300, 500],
        [],
        [7, 9],
    ]
    ranks = tokens_by_rank(report)
    assert list(ranks.values())[0] == [0.0, None, 7.0]
    assert list(ranks.values())[-1] == [500.0, None, 9.0]


def test_sentence_counts_experts_that_lean_on_tokens_of_others():
    report = _with_experts([[500, 0, 100, 300], [], [7, 900]])
    wanted = (
        "Of 6 experts 3 were routed fewer tokens than those of other experts count for in their Hessians,"
        " 1 of them none; the fewest 0, the most 900."
    )
    assert sentence(report) == wanted
    assert wanted in render_html(report)
    assert wanted in format_report(report)


def test_picture_has_a_mark_for_every_rank_and_block():
    page = render_html(_with_experts([[500, 0, 100, 300], [7, 900]]))
    assert "Tokens of the experts" in page
    assert all(f"most tokens, block {index}" in page for index in (0, 1))


def test_dense_models_have_neither_sentence_nor_picture():
    report = example_report()
    assert (sentence(report), tokens_by_rank(report)) == (None, {})
    assert "experts" not in render_html(report)
