"""The Prefect form: generated from the table of options, ending in the same validator."""

import json

import jsonschema
import pytest
from prefect.utilities.collections import visit_collection
from pydantic import ValidationError

from flows.params import (
    CompareParams,
    NewCheckpointsParams,
    QuantizeParams,
    RecipeParams,
    params_from,
    read_new_checkpoints,
)
from flows.quantize_model import quantize_model
from quantlib.errors import RecipeError
from quantlib.job.comparison_request import NOT_COMPARED, OUTPUT_HELP, SCHEMES_HELP, comparison_request
from quantlib.job.incoming import OF_A_CHECKPOINT
from quantlib.job.options import option_fields, options_from
from quantlib.job.provenance import with_replayed_values
from quantlib.job.several_formats import requests_of_formats
from quantlib.schemes import CODEBOOK_NAMES, FLOAT_NAMES, ROUNDED_INPUTS_NAMES
from tests.support.provenance_example import write_provenance

REQUEST = {"source": "s3://models/tiny", "output": "s3://models/out", "method": "rtn"}
FULL = {
    **REQUEST,
    "scheme": "W8A16_ASYM",
    "group_size": -1,
    "format": "gptq, compressed-tensors",
    "target": "vllm",
    "tensor_parallel": 4,
    "workers": 2,
    "worker_labels": "pool=in(a, b)",
    "placement": "strict-spread",
    "mixed_gpus": True,
    "calibration": "c.txt",
    "rules": [{"match": "*.down_proj", "group_size": 32}, {"match": "lm_head", "keep": True}],
}


def schema() -> dict:
    return QuantizeParams.model_json_schema()


def test_form_has_every_option_with_its_text_and_default():
    properties = schema()["properties"]
    assert properties.keys() == {*option_fields(), "credentials"}
    for name, (found, option) in option_fields().items():
        assert properties[name]["description"] == option.help
        if name in ("source", "output"):
            assert "default" not in properties[name]
        else:
            assert properties[name]["default"] == ([] if name == "rules" else found.default)
    assert schema()["required"] == ["source", "output"]


def test_form_begins_with_what_most_people_fill_in_and_keeps_the_order_of_the_table_below():
    properties = schema()["properties"]
    assert len({values["position"] for values in properties.values()}) == len(properties)
    shown = sorted(properties, key=lambda name: properties[name]["position"])
    titles = [properties[name]["title"] for name in shown]
    assert titles[:6] == ["Source", "Output", "Calibration", "Evaluation", "Scheme", "Group size"]
    rest = shown[shown.index("evaluation_sequences") + 1 :]
    assert rest == [*(name for name in option_fields() if name in rest), "credentials"]


def test_form_has_constraints_where_a_server_can_check_them():
    properties = schema()["properties"]
    integers = [f"W{bits}A16{kind}" for kind in ("", "_ASYM") for bits in (2, 3, 4, 5, 6, 8)]
    names = [*integers, *FLOAT_NAMES, *ROUNDED_INPUTS_NAMES, *CODEBOOK_NAMES]
    assert properties["scheme"]["enum"] == names
    assert properties["format"]["examples"] == ["compressed-tensors", "gptq", "awq", "bitsandbytes", "gguf"]
    assert properties["sequences"]["minimum"] == 1
    assert {"minimum": 1, "type": "integer"} in properties["workers"]["anyOf"]
    assert schema()["additionalProperties"] is False
    assert schema()["$defs"]["RuleParams"]["additionalProperties"] is False


@pytest.mark.parametrize("values", [REQUEST, FULL])
def test_form_to_options_equals_plain_values(values):
    assert QuantizeParams.model_validate(values).to_options() == options_from(values)


@pytest.mark.parametrize("values", [REQUEST, FULL])
def test_params_from_options_and_back_changes_nothing(values):
    options = options_from(values)
    assert params_from(options).to_options() == options


def test_form_names_targets_and_takes_no_other():
    target = schema()["properties"]["target"]
    assert {"enum": ["vllm", "transformers", "bitsandbytes", "llama.cpp"], "type": "string"} in target[
        "anyOf"
    ]
    assert schema()["properties"]["tensor_parallel"]["minimum"] == 1
    assert schema()["properties"]["outlier_weights"]["maximum"] == 100
    with pytest.raises(ValidationError):
        QuantizeParams.model_validate({**REQUEST, "target": "sglang"})


def test_a_run_is_titled_by_the_format_that_the_target_decides():
    titled = QuantizeParams.model_validate({**REQUEST, "target": "vllm"}).title
    assert titled == "tiny to W4A16 g128 compressed-tensors"


def test_checkpoint_interval_schema_is_one_range():
    found = schema()["properties"]["checkpoint_every"]
    assert {"minimum": 0, "type": "integer"} in found["anyOf"] and "not" not in found
    assert (
        QuantizeParams.model_validate({**REQUEST, "checkpoint_every": 0}).to_options().checkpoint_every == 0
    )


def _as_the_page_sends_it(values: dict) -> dict:
    """Prefect's page fills in the default of every field that was left alone."""
    defaults = {
        name: field["default"] for name, field in schema()["properties"].items() if "default" in field
    }
    return {**defaults, **values}


def test_form_with_every_default_filled_in_is_the_same_request():
    sent = _as_the_page_sends_it(FULL)
    assert QuantizeParams.model_validate(sent).to_options() == options_from(FULL)


def test_replay_in_a_form_goes_below_what_differs_from_the_defaults(tmp_path):
    wanted = {
        "source": "s3://models/tiny",
        "output": "b",
        "seed": 4,
        "replay": str(write_provenance(tmp_path)),
    }
    for sent in (wanted, _as_the_page_sends_it(wanted)):
        options = QuantizeParams.model_validate(sent).to_options()
        assert (options.scheme, options.group_size, options.method) == ("W8A16", 64, "rtn")
        assert (options.source, options.output, options.work) == ("s3://models/tiny", "b", None)
        assert (options.seed, options.threads_per_worker, options.runner) == (4, 3, "ray")


def test_params_from_a_replay_keep_a_default_that_was_given(tmp_path):
    values = {"replay": str(write_provenance(tmp_path)), "evaluation_sequences": 32}
    options = options_from(with_replayed_values(values))
    assert options.evaluation_sequences == 32
    params = params_from(options)
    assert params.to_options() == options
    # What Prefect does with the parameters of a flow that is called.
    seen = quantize_model.validate_parameters({"params": params})["params"]
    assert seen.to_options() == options
    copied = visit_collection({"params": seen}, lambda value: value, return_data=True)["params"]
    assert copied.to_options() == options


def test_missing_provenance_is_refused_before_work(tmp_path):
    params = QuantizeParams.model_validate({**REQUEST, "replay": str(tmp_path / "none.json")})
    with pytest.raises(RecipeError, match="there is no file://") as raised:
        params.to_options()
    assert raised.value.before_work


def test_params_from_options_survives_json():
    params = params_from(options_from(FULL))
    stored = json.loads(params.model_dump_json())
    assert QuantizeParams.model_validate(stored).to_options() == options_from(FULL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bogus": 1},
        {"scheme": "W7A16"},
        {"format": "ggml"},
        {"format": "gptq;awq"},
        {"sequences": 0},
        {"sequences": "64"},
        {"sequences": True},
        {"source": " "},
        {"group_size": -2},
        {"runner": "inprocess"},
        {"rules": [{"match": "a", "bits": 4}]},
        {"rules": [{"scheme": "W4A16"}]},
        {"rules": {"match": "a"}},
        {"max_fallback_share": 1.01},
        {"max_fallback_share": -0.01},
        {"max_fallback_share": "0.1"},
        {"max_fallback_share": True},
        {"publish": "never"},
        {"hook_timeout": 0},
        {"hook_timeout": 1.5},
        {"hook": "rm -r /"},
        {"hook": "smoke"},
        {"hook": "@smoke; rm -r /"},
        {"hook": "@"},
    ],
)
def test_wrong_value_is_refused_by_the_model_and_by_its_schema(wrong):
    values = {**REQUEST, **wrong}
    with pytest.raises(ValidationError):
        QuantizeParams.model_validate(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema())


@pytest.mark.parametrize("limit", [0, 0.25, 1, None])
def test_a_limit_is_any_number_in_its_range(limit):
    values = {**REQUEST, "max_fallback_share": limit}
    assert jsonschema.Draft202012Validator(schema()).is_valid(values)
    assert QuantizeParams.model_validate(values).to_options().max_fallback_share == limit


def test_a_form_takes_hooks_by_name():
    values = {**REQUEST, "hook": "@smoke-test.2"}
    assert jsonschema.Draft202012Validator(schema()).is_valid(values)
    assert QuantizeParams.model_validate(values).to_options().hook == "@smoke-test.2"


@pytest.mark.parametrize("hook", ["@smoke", "python smoke.py {model}"])
def test_a_hook_of_the_command_line_reaches_its_run_and_a_command_no_form(hook):
    options = options_from({**REQUEST, "hook": hook})
    params = params_from(options)
    seen = quantize_model.validate_parameters({"params": params})["params"]
    assert params.to_options() == seen.to_options() == options
    stored = json.loads(params.model_dump_json())
    assert stored["hook"] == (hook if hook.startswith("@") else None)
    assert QuantizeParams.model_validate(stored).to_options().hook == stored["hook"]


@pytest.mark.parametrize("size", [-2, -1, 0, 1, 7, 8, 9, 4096])
def test_group_size_schema_allows_what_the_validator_allows(size):
    values = {**REQUEST, "group_size": size}
    allowed = size in (-1, 0) or size >= 8
    assert jsonschema.Draft202012Validator(schema()).is_valid(values) is allowed
    if not allowed:
        with pytest.raises((ValidationError, RecipeError)):
            QuantizeParams.model_validate(values).to_options()


def test_what_a_schema_cannot_say_is_found_by_the_validator():
    with pytest.raises(RecipeError, match="gptq needs calibration text"):
        QuantizeParams.model_validate({**REQUEST, "method": "gptq"}).to_options()


def test_title_names_model_and_scheme():
    params = QuantizeParams.model_validate({**REQUEST, "source": "s3://models/tiny/", "group_size": 64})
    assert params.title == "tiny to W4A16 g64 compressed-tensors"


COMPARISON = {
    "source": "s3://models/tiny",
    "schemes": ["W4A16", "rtn:W3A16_ASYM@32"],
    "calibration": "c.txt",
    "evaluation": "e.txt",
    "group_size": -1,
    "rules": [{"match": "lm_head", "keep": True}],
}


def test_form_of_a_comparison_has_the_options_of_a_job_and_its_entries():
    found = CompareParams.model_json_schema()
    properties, options = found["properties"], schema()["properties"]
    assert properties.keys() - {"schemes"} == options.keys() - NOT_COMPARED.keys()
    assert all(properties[name] == options[name] for name in properties.keys() - {"schemes", "output"})
    assert sorted(found["required"]) == ["schemes", "source"]
    assert properties["schemes"]["description"] == SCHEMES_HELP
    assert properties["schemes"]["minItems"] == 1
    assert properties["output"]["description"] == OUTPUT_HELP
    assert len({values["position"] for values in properties.values()}) == len(properties)


def test_form_of_a_comparison_is_the_request_of_plain_values():
    properties = CompareParams.model_json_schema()["properties"]
    defaults = {name: field["default"] for name, field in properties.items() if "default" in field}
    for sent in (COMPARISON, {**defaults, **COMPARISON}):
        assert CompareParams.model_validate(sent).to_request() == comparison_request(COMPARISON)
    assert CompareParams.model_validate(COMPARISON).title == "tiny by W4A16, rtn:W3A16_ASYM@32"


@pytest.mark.parametrize(
    "wrong",
    [
        {"schemes": []},
        {"schemes": [" "]},
        {"scheme": "W4A16"},
        {"replay": "p"},
        {"max_kl": 1.0},
        {"hook": "@a"},
    ],
)
def test_form_of_a_comparison_refuses(wrong):
    with pytest.raises(ValidationError):
        CompareParams.model_validate({**COMPARISON, **wrong})


def test_ray_address_that_was_left_alone_is_that_of_the_environment(monkeypatch):
    request = {"source": "s3://m", "output": "s3://q", "method": "rtn"}
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert QuantizeParams.model_validate(request).to_options().ray_address == "head:6379"
    named = QuantizeParams.model_validate({**request, "ray_address": "other:6379"})
    assert named.to_options().ray_address == "other:6379"
    assert named.values_given()["ray_address"] == "other:6379"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert QuantizeParams.model_validate(request).to_options().ray_address is None


PASS = {
    "prefix": "s3://models/incoming",
    "outputs": "s3://models/quantized",
    "recipes": [
        {"name": "w4", "method": "rtn", "rules": [{"match": "lm_head", "keep": True}]},
        {"name": "w8.gptq", "method": "rtn", "scheme": "W8A16", "format": "gptq"},
    ],
}


def test_form_of_a_recipe_has_a_name_and_the_options_that_do_not_follow_from_the_checkpoint():
    found = RecipeParams.model_json_schema()
    properties, options = found["properties"], schema()["properties"]
    assert properties.keys() - {"name"} == options.keys() - {*OF_A_CHECKPOINT, "credentials"}
    assert all(properties[name] == options[name] for name in properties.keys() - {"name"})
    assert found["required"] == ["name"]
    assert len({values["position"] for values in properties.values()}) == len(properties)


def test_form_of_a_pass_is_what_it_looks_for():
    found = NewCheckpointsParams.model_json_schema()
    assert sorted(found["required"]) == ["outputs", "prefix", "recipes"]
    assert all("description" in values for values in found["properties"].values())
    recipe = RecipeParams.model_json_schema()["properties"]
    defaults = {name: field["default"] for name, field in recipe.items() if "default" in field}
    for recipes in (PASS["recipes"], [{**defaults, **recipe} for recipe in PASS["recipes"]]):
        params = NewCheckpointsParams.model_validate({**PASS, "recipes": recipes})
        incoming = params.to_incoming()
        assert list(incoming.recipes) == ["w4", "w8.gptq"]
        assert incoming.recipes["w4"]["rules"] == [{"match": "lm_head", "keep": True}]
        assert incoming.recipes["w8.gptq"] == {"method": "rtn", "scheme": "W8A16", "format": "gptq"}
        assert (incoming.settle_s, incoming.attempts, incoming.runs_at_a_time) == (600, 3, 1)
        assert params.title == "new checkpoints of s3://models/incoming"


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipes": []},
        {"recipes": [{"method": "rtn"}]},
        {"recipes": [{"name": "a/b"}]},
        {"recipes": [{"name": ".."}]},
        {"recipes": [{"name": "w4", "source": "s3://x/y"}]},
        {"recipes": [{"name": "w4", "work": "s3://x/y"}]},
        {"recipes": [{"name": "w4", "bits": 4}]},
        {"prefix": " "},
        {"depth": 0},
        {"settle_seconds": -1},
        {"runs_at_a_time": 0},
        {"attempts": 0},
        {"deployment": "quantize-recipes"},
        {"more": 1},
    ],
)
def test_form_of_a_pass_refuses(wrong):
    with pytest.raises(ValidationError):
        NewCheckpointsParams.model_validate({**PASS, **wrong})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**PASS, **wrong}, NewCheckpointsParams.model_json_schema())


def test_recipes_of_one_name_are_refused():
    twice = {**PASS, "recipes": [{"name": "w4"}, {"name": "w4", "scheme": "W8A16"}]}
    with pytest.raises(RecipeError, match="two recipes have one name"):
        NewCheckpointsParams.model_validate(twice).to_incoming()


def test_form_of_one_layout_of_several_holds_its_whole_request():
    values = {**REQUEST, "format": "gptq, compressed-tensors", "rules": [{"match": "lm_head", "keep": True}]}
    for request in requests_of_formats(options_from(values)):
        sent = json.loads(params_from(request).model_dump_json(exclude_unset=True))
        assert QuantizeParams.model_validate(sent).to_options() == request


FILE = """
prefix = "incoming"
outputs = "made"
settle_seconds = 0

[[recipes]]
name = "w4"
method = "rtn"
rules = [{ match = "lm_head", keep = true }]
"""


def test_a_pass_is_read_from_a_file(tmp_path):
    (tmp_path / "incoming.toml").write_text(FILE)
    params = read_new_checkpoints(tmp_path / "incoming.toml")
    assert (params.prefix, params.outputs, params.settle_seconds) == ("incoming", "made", 0)
    assert params.to_incoming().recipes == {
        "w4": {"method": "rtn", "rules": [{"match": "lm_head", "keep": True}]}
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prefix = ", "not valid TOML"),
        (FILE.replace("outputs", "output"), "outputs"),
        (FILE.replace("settle_seconds = 0", "settle_seconds = -1"), "settle_seconds"),
        (FILE.replace('method = "rtn"', 'method = "awq"'), r"recipes\.0\.method"),
        (FILE + '[[recipes]]\nname = "w4"\n', "two recipes have one name"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_says_no_pass_is_refused_before_work(tmp_path, text, said):
    path = tmp_path / "incoming.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=said) as raised:
        read_new_checkpoints(path)
    assert raised.value.before_work
