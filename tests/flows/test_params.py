"""The Prefect form: generated from the table of options, ending in the same validator."""

import json

import jsonschema
import pytest
from pydantic import ValidationError

from flows.params import QuantizeParams, params_from
from quantlib.errors import RecipeError
from quantlib.job.options import option_fields, options_from

REQUEST = {"source": "s3://models/tiny", "output": "s3://models/out", "method": "rtn"}
FULL = {
    **REQUEST,
    "scheme": "W8A16_ASYM",
    "group_size": -1,
    "workers": 2,
    "calibration": "c.txt",
    "rules": [{"match": "*.down_proj", "group_size": 32}, {"match": "lm_head", "keep": True}],
}


def schema() -> dict:
    return QuantizeParams.model_json_schema()


def test_form_has_every_option_in_order_with_its_text_and_default():
    properties = schema()["properties"]
    assert list(properties) == list(option_fields())
    for position, (name, (found, option)) in enumerate(option_fields().items()):
        assert properties[name]["description"] == option.help
        assert properties[name]["position"] == position
        if name in ("source", "output"):
            assert "default" not in properties[name]
        else:
            assert properties[name]["default"] == ([] if name == "rules" else found.default)
    assert schema()["required"] == ["source", "output"]


def test_form_has_constraints_where_a_server_can_check_them():
    properties = schema()["properties"]
    assert properties["scheme"]["enum"] == ["W4A16", "W8A16", "W4A16_ASYM", "W8A16_ASYM"]
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


def test_params_from_options_survives_json():
    params = params_from(options_from(FULL))
    stored = json.loads(params.model_dump_json())
    assert QuantizeParams.model_validate(stored).to_options() == options_from(FULL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bogus": 1},
        {"scheme": "W3A16"},
        {"sequences": 0},
        {"sequences": "64"},
        {"sequences": True},
        {"source": " "},
        {"group_size": -2},
        {"runner": "inprocess"},
        {"rules": [{"match": "a", "bits": 4}]},
        {"rules": [{"scheme": "W4A16"}]},
        {"rules": {"match": "a"}},
    ],
)
def test_wrong_value_is_refused_by_the_model_and_by_its_schema(wrong):
    values = {**REQUEST, **wrong}
    with pytest.raises(ValidationError):
        QuantizeParams.model_validate(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema())


@pytest.mark.parametrize("size", [-2, -1, 0, 1, 7, 8, 9, 4096])
def test_group_size_schema_allows_what_the_validator_allows(size):
    values = {**REQUEST, "group_size": size}
    allowed = size == -1 or size >= 8
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
