"""Gates over made-up reports: what passes, what breaks, and what is refused before any work."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import GateError, RecipeError
from quantlib.job.gates import GATE_OPTIONS, check_gates, refuse_broken
from quantlib.job.options import options_from

REQUEST = {"source": "a", "output": "b", "method": "rtn"}
FIGURES = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 3))
LIMITS = st.floats(0.0, 3.0)


@st.composite
def reports(draw) -> dict[str, Any]:
    sizes = draw(st.lists(st.integers(0, 4), max_size=4))
    blocks = [{"relative_error": draw(FIGURES), "linears": [{}] * size} for size in sizes]
    evaluation = draw(st.none() | st.fixed_dictionaries({"ratio": FIGURES, "kl_divergence": FIGURES}))
    fallbacks = [{}] * draw(st.integers(0, sum(sizes)))
    return {"evaluation": evaluation, "blocks": blocks, "fallbacks": fallbacks}


def _keeps(figure: object, limit: float) -> bool:
    return isinstance(figure, int | float) and math.isfinite(figure) and figure <= limit


def _expected(report: dict[str, Any], gate: str, limit: float) -> bool:
    """By the meaning of each gate, over every part it is about."""
    evaluation = report["evaluation"] or {}
    errors = [block["relative_error"] for block in report["blocks"]]
    num_linears = sum(len(block["linears"]) for block in report["blocks"])
    match gate:
        case "max_perplexity_ratio":
            return _keeps(evaluation.get("ratio"), limit)
        case "max_kl":
            return _keeps(evaluation.get("kl_divergence"), limit)
        case "max_block_error":
            return bool(errors) and all(_keeps(error, limit) for error in errors)
    return not report["fallbacks"] or _keeps(len(report["fallbacks"]) / num_linears, limit)


@given(report=reports(), limits=st.dictionaries(st.sampled_from(GATE_OPTIONS), LIMITS))
def test_a_report_passes_a_gate_only_with_a_finite_figure_within_the_limit(report, limits):
    found = check_gates(report, limits)
    assert [gate["gate"] for gate in found] == list(limits)
    assert [gate["limit"] for gate in found] == list(limits.values())
    for gate in found:
        assert gate["passed"] == _expected(report, gate["gate"], gate["limit"])
        assert gate["figure"] is None or math.isfinite(gate["figure"])
    if all(gate["passed"] for gate in found):
        refuse_broken("s3://b/o", found)
        return
    with pytest.raises(GateError) as caught:
        refuse_broken("s3://b/o", found)
    for gate in found:
        assert (f"{gate['gate']} allows" in str(caught.value)) is not gate["passed"]


@pytest.mark.parametrize("gate", ["max_perplexity_ratio", "max_kl", "max_block_error"])
@given(limit=LIMITS)
def test_a_figure_that_is_the_limit_passes_and_the_next_one_does_not(gate, limit):
    def passed(figure: float) -> bool:
        blocks = [{"relative_error": figure, "linears": []}, {"relative_error": 0.0, "linears": []}]
        losses = {"ratio": figure, "kl_divergence": figure}
        (found,) = check_gates({"evaluation": losses, "blocks": blocks, "fallbacks": []}, {gate: limit})
        return found["passed"]

    assert passed(limit)
    assert not passed(math.nextafter(limit, 9))


def test_a_share_of_fallbacks_counts_the_linears_of_all_blocks():
    report = {"blocks": [{"linears": [{}] * 5}, {"linears": [{}] * 3}], "fallbacks": [{}] * 3}
    limits = (math.nextafter(0.375, 0), 0.375)
    found = [check_gates(report, {"max_fallback_share": limit})[0] for limit in limits]
    assert [gate["passed"] for gate in found] == [False, True]


def test_a_figure_that_rounds_to_its_limit_is_told_in_full():
    report = {"evaluation": {"kl_divergence": math.nextafter(0.1, 1)}}
    with pytest.raises(GateError, match=r"max_kl allows 0\.1, found 0\.10000000000000002"):
        refuse_broken("o", check_gates(report, {"max_kl": 0.1}))


@pytest.mark.parametrize("gate", ["max_perplexity_ratio", "max_kl", "max_block_error"])
def test_a_gate_without_its_figure_is_refused_before_work(gate):
    with pytest.raises(RecipeError, match=f"{gate} 0.5 is a limit") as caught:
        options_from({**REQUEST, gate: 0.5})
    assert caught.value.facts["option"] == gate
    assert getattr(options_from({**REQUEST, gate: 0.5, "evaluation": "e.txt"}), gate) == 0.5


def test_a_share_of_fallbacks_needs_no_text():
    assert options_from({**REQUEST, "max_fallback_share": 0}).max_fallback_share == 0
