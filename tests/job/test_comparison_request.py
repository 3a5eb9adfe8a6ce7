"""What a comparison may be asked for, and what becomes of it."""

from typing import Any

import pytest

from quantlib.errors import RecipeError
from quantlib.job.command_line import build_parser, comparison_values
from quantlib.job.comparison_request import ComparisonRequest, comparison_request, departs_from_default
from quantlib.job.options import options_from

TEXTS = {"calibration": "c.jsonl", "evaluation": "e.jsonl"}


def request(*schemes: str, **given: Any) -> ComparisonRequest:
    return comparison_request({"source": "m", **TEXTS, "schemes": list(schemes), **given})


def test_every_entry_is_a_conversion_with_what_follows_from_its_bits():
    found = request("W4A16", "rtn:W8A16@64", "W3A16_ASYM@32", group_size=256, sequences=7)
    three = {"source": "m", **TEXTS, "propagation": "original", "sequences": 7}
    assert found.conversions == (
        options_from({**three, "output": "gptq-W4A16-g256", "scheme": "W4A16", "group_size": 256}),
        options_from(
            {**three, "output": "rtn-W8A16-g64", "scheme": "W8A16", "group_size": 64, "method": "rtn"}
        ),
        options_from({**three, "output": "gptq-W3A16_ASYM-g32", "scheme": "W3A16_ASYM", "group_size": 32}),
    )
    # By itself the last would calibrate on quantized blocks.
    assert [departs_from_default(options) for options in found.conversions] == [False, False, True]


def test_method_of_the_job_is_that_of_entries_without_one():
    found = comparison_request(
        {"source": "m", "evaluation": "e", "method": "rtn", "schemes": ["W4A16", "W8A16"]}
    )
    assert [entry.method for entry in found.entries] == ["rtn", "rtn"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schemes": []}, "schemes must be a list of entries"),
        ({"schemes": None}, "schemes must be a list of entries"),
        ({"schemes": "W4A16"}, "schemes must be a list of entries"),
        ({"schemes": ["W4A16", 4]}, "schemes must be a list of entries"),
        ({"schemes": ["W4A16", "gptq:W4A16@128"]}, "gptq:W4A16@128 is there twice"),
        ({"schemes": ["W4A16", "W8A16", "W7A16"]}, "'W7A16': scheme must be one of"),
        ({"evaluation": None}, "needs held-out text and none was given"),
        ({"calibration": None}, "gptq needs calibration text"),
        ({"replay": "p.json"}, "takes no replay, that repeats one run"),
        ({"scheme": "W4A16"}, "takes no scheme, its schemes say it"),
        ({"max_kl": 0.5}, "takes no max_kl, it shows what entries cost, and holds them to nothing"),
        ({"hook": "true"}, "takes no hook, it shows"),
        ({"output": ""}, "output must not be empty"),
        ({"output": 3}, "output must be text"),
        ({"bogus": 1}, "unknown option 'bogus'"),
        ({"source": None}, "source is required"),
        ({"correct_targets": True}, "correct_targets needs propagation quantized, found original"),
        ({"format": "gptq,awq"}, "a comparison has one format, found gptq, awq"),
        ({"ray_address": "auto"}, "neither output nor work is named"),
    ],
)
def test_wrong_request_is_refused(given, said):
    with pytest.raises(RecipeError, match=said):
        comparison_request({"source": "m", **TEXTS, "schemes": ["W4A16"], **given})


def test_schemes_that_one_layout_does_not_hold_are_compared_in_their_own():
    conversions = request("W4A16", "rtn:NF4", "NVFP4A16").conversions
    layouts = [options.format for options in conversions]
    assert layouts == ["compressed-tensors", "bitsandbytes", "compressed-tensors"]


@pytest.mark.parametrize("given", [{"format": "gguf"}, {"target": "llama.cpp"}])
def test_entries_of_gguf_have_its_groups_unless_they_name_others(given):
    found = request("W4A16", "rtn:W8A16", **given)
    assert [str(entry) for entry in found.entries] == ["gptq:W4A16@32", "rtn:W8A16@32"]
    assert {(x.format, x.group_size) for x in found.conversions} == {("gguf", 32)}
    assert [entry.group_size for entry in request("W4A16", "W8A16@16", group_size=64, **given).entries] == [
        64,
        16,
    ]
    assert [entry.group_size for entry in request("W4A16").entries] == [128]


def test_outputs_and_work_prefixes_lie_below_what_is_named():
    (kept,) = request("W4A16", output="s3://o/all", work="s3://w").placed("s3://o/all")
    assert (kept.output, kept.work) == ("s3://o/all/gptq-W4A16-g128", "s3://w/gptq-W4A16-g128")
    (beside,) = request("W4A16", output="all").placed("all")
    assert (beside.output, beside.work) == ("all/gptq-W4A16-g128", None)
    # What is not kept has its work prefix with it, so that nothing else is to be removed.
    (passing,) = request("W4A16", work="s3://w").placed("s3://w/x")
    assert (passing.output, passing.work) == ("s3://w/x/gptq-W4A16-g128", None)


def values_of_line(line: str) -> dict[str, Any]:
    return comparison_values(build_parser("quantmill").parse_args(line.split()))


def test_command_line_wins_over_a_recipe_whose_scheme_gives_way(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('scheme = "W2A16"\ngroup_size = 64\nseed = 5\n[[rules]]\nmatch = "x"\nkeep = true\n')
    line = "compare m --schemes W4A16 rtn:W8A16@32 --calibration c --evaluation e"
    found = comparison_request(values_of_line(f"{line} --recipe {recipe} --seed 6 --output o"))
    assert [str(entry) for entry in found.entries] == ["gptq:W4A16@64", "rtn:W8A16@32"]
    assert (found.output, found.options.seed) == ("o", 6)
    assert found.options.rules == ({"match": "x", "keep": True},)


@pytest.mark.parametrize(
    "line",
    ["compare m", "compare m --schemes W4A16", "compare m --schemes W9", "compare m --recipe none.toml"],
)
def test_wrong_line_is_refused_before_work(line):
    with pytest.raises(RecipeError) as refused:
        values_of_line(line)
    assert refused.value.before_work


def test_columns_and_weights_are_kept_of_the_entries_that_can_tell_which():
    found = request("W4A16", "rtn:W4A16", outlier_columns=8)
    assert [options.outlier_columns for options in found.conversions] == [8, 0]
    found = request("W4A16", "rtn:W4A16", outlier_weights=5)
    assert [options.outlier_weights for options in found.conversions] == [5, 0]
