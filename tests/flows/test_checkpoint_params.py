"""The forms of flows about one checkpoint: what the command of the same name takes, and nothing else."""

import json

import jsonschema
import pytest
from pydantic import ValidationError

from flows.checkpoint_params import CleanParams, EvaluateParams, VerifyParams
from flows.params import QuantizeParams, common_credentials
from quantlib.errors import RecipeError
from quantlib.job.command_line import COMMANDS, build_parser

FORMS = {"evaluate": EvaluateParams, "verify": VerifyParams, "clean": CleanParams}
LEAST = {
    "evaluate": {"model": "s3://m/out", "text": "s3://m/text.jsonl"},
    "verify": {"output": "s3://m/out"},
    "clean": {"output": "s3://m/out"},
}


@pytest.mark.parametrize("command", FORMS)
def test_form_takes_what_the_command_takes(command):
    schema = FORMS[command].model_json_schema()
    flags = {flag.removeprefix("--") for flag, _ in COMMANDS[command].others} - {"json"}
    assert set(schema["properties"]) >= {*COMMANDS[command].addresses, *COMMANDS[command].options, *flags}
    assert schema["required"] == list(LEAST[command])
    assert all(field["description"].endswith(".") for field in schema["properties"].values())
    assert len({field["position"] for field in schema["properties"].values()}) == len(schema["properties"])


@pytest.mark.parametrize("command", FORMS)
def test_defaults_are_those_of_the_command_line(command):
    values = FORMS[command](**LEAST[command]).model_dump()
    words = [command, *(values[name] for name in COMMANDS[command].addresses)]
    words += [word for name in LEAST[command] if name == "text" for word in ("--text", values[name])]
    parsed = vars(build_parser("quantmill").parse_args(words))
    for name in set(parsed) & set(values):
        assert parsed[name] == values[name]


@pytest.mark.parametrize("command", FORMS)
@pytest.mark.parametrize(
    "wrong", [{"bogus": 1}, {"credentials": "AKIA/secret"}, {"storage_engine": "ftp"}, {"worker_labels": 7}]
)
def test_nonsense_is_refused_by_the_model_and_by_its_schema(command, wrong):
    values = {**LEAST[command], **wrong}
    with pytest.raises(ValidationError):
        FORMS[command].model_validate(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, FORMS[command].model_json_schema())


@pytest.mark.parametrize("command", FORMS)
def test_required_text_must_not_be_empty(command):
    for name in LEAST[command]:
        with pytest.raises(ValidationError):
            FORMS[command].model_validate({**LEAST[command], name: " "})


def test_worker_that_computes_stands_where_it_is_asked_to():
    params = EvaluateParams(**LEAST["evaluate"], device="cuda", worker_labels="pool=a", threads_per_worker=3)
    options = params.worker_options()
    assert (options.device, options.worker_labels, options.threads_per_worker) == ("cuda", "pool=a", 3)


@pytest.mark.parametrize("form", [VerifyParams, CleanParams])
def test_worker_that_reads_takes_no_gpu_and_one_core(form):
    options = form(output="s3://m/out", ray_address="10.0.0.1:6379").worker_options()
    assert (options.device, options.threads_per_worker) == ("cpu", 1)
    assert options.ray_address == "10.0.0.1:6379"


def test_labels_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="label"):
        VerifyParams(output="s3://m/out", worker_labels="pool").worker_options()


def test_run_is_titled_by_what_it_does_and_to_what():
    assert EvaluateParams(**LEAST["evaluate"], credentials="keys").title == "Evaluation of out"
    assert VerifyParams(output="/data/llama/").title == "Verification of llama"


def test_conversions_of_one_run_share_their_credentials():
    def conversion(name):
        return QuantizeParams(source="m", output="q", method="rtn", credentials=name)

    assert common_credentials([conversion("a"), conversion("a")]) == "a"
    assert common_credentials([conversion(None)]) is None
    with pytest.raises(RecipeError, match="a, b") as raised:
        common_credentials([conversion("a"), conversion("b")])
    assert raised.value.before_work


def test_credentials_are_no_option_of_a_job():
    params = QuantizeParams(source="m", output="q", method="rtn", credentials="keys")
    assert params.to_options() == QuantizeParams(source="m", output="q", method="rtn").to_options()
    assert json.loads(params.model_dump_json())["credentials"] == "keys"
