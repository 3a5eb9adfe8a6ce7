"""The table of options and its validator."""

import dataclasses

import pytest

from quantlib.errors import RecipeError
from quantlib.job.option_table import is_optional, kind_of
from quantlib.job.options import JobOptions, option_fields, options_from
from quantlib.packing import FORMATS

REQUEST = {"source": "s3://models/a", "output": "s3://models/b", "method": "rtn"}


def test_options_from_minimal_request_takes_every_default():
    options = options_from(REQUEST)
    assert dataclasses.asdict(options) == {
        "source": "s3://models/a",
        "output": "s3://models/b",
        "work": None,
        "scheme": "W4A16",
        "group_size": 128,
        "method": "rtn",
        "format": "compressed-tensors",
        "embeddings": "keep",
        "portable_scales": False,
        "target": None,
        "tensor_parallel": 1,
        "propagation": "original",
        "correct_targets": False,
        "scale_search": "hessian",
        "column_order": "activation",
        "descent_passes": 0,
        "refit_scales": False,
        "outlier_columns": 0,
        "outlier_weights": 0,
        "tf32_feedback": False,
        "correct_biases": False,
        "calibration_routing": "routed",
        "expert_shrinkage": 100,
        "rules": (),
        "calibration": None,
        "evaluation": None,
        "text_column": None,
        "sequences": 256,
        "sequence_length": 2048,
        "evaluation_sequences": 32,
        "seed": 0,
        "max_perplexity_ratio": None,
        "max_kl": None,
        "max_fallback_share": None,
        "max_block_error": None,
        "publish": "when-passed",
        "hook": None,
        "hook_timeout": 3600,
        "runner": "ray",
        "workers": None,
        "threads_per_worker": None,
        "worker_memory": None,
        "device_memory": None,
        "object_store_memory": None,
        "device": None,
        "gpu_model": None,
        "mixed_gpus": False,
        "worker_resources": None,
        "worker_labels": None,
        "placement": None,
        "ray_address": None,
        "storage_engine": "obstore",
        "checkpoint_every": None,
        "replay": None,
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"group-size": 64}, r"unknown option 'group-size'; the options are source, output, work, scheme"),
        ({"sequences": 0}, "sequences must be at least 1, found 0"),
        ({"sequences": "64"}, "sequences must be a whole number, found '64'"),
        ({"sequences": 64.0}, "sequences must be a whole number, found 64.0"),
        ({"sequences": True}, "sequences must be a whole number, found True"),
        ({"sequences": None}, "sequences must be a whole number, found None"),
        ({"correct_targets": 1}, "correct_targets must be true or false, found 1"),
        ({"group_size": 4}, "group_size must be at least 8 or -1 or 0, found 4"),
        ({"group_size": -2}, "group_size must be at least 8 or -1 or 0, found -2"),
        ({"scheme": "W7A16"}, "scheme must be one of W2A16, W3A16, W4A16, W5A16, W6A16, W8A16, W2A16_ASYM"),
        ({"scheme": 4}, "scheme must be text, found 4"),
        ({"scheme": None}, "scheme must be text, found None"),
        ({"format": "ggml"}, "gguf, or several with commas between them, found 'ggml'"),
        ({"format": "gptq,"}, "or several with commas between them, found 'gptq,'"),
        ({"format": "gptq, awq,gptq"}, "format names one of its values twice"),
        ({"max_fallback_share": 1.5}, "max_fallback_share must be at most 1, found 1.5"),
        ({"max_fallback_share": -0.1}, "max_fallback_share must be at least 0, found -0.1"),
        ({"max_fallback_share": float("nan")}, "max_fallback_share must be a finite number, found nan"),
        ({"max_fallback_share": float("inf")}, "max_fallback_share must be a finite number, found inf"),
        ({"max_fallback_share": True}, "max_fallback_share must be a finite number, found True"),
        ({"max_fallback_share": "0.1"}, "max_fallback_share must be a finite number, found '0.1'"),
        ({"max_kl": 0.1}, "max_kl 0.1 is a limit on what held-out text measures, and none was given"),
        ({"max_block_error": 1, "evaluation": None}, "max_block_error 1 is a limit"),
        ({"max_perplexity_ratio": 1.1}, "max_perplexity_ratio 1.1 is a limit"),
        ({"hook": "echo 'a"}, "is no command: No closing quotation"),
        ({"hook": "@no name"}, "hook '@no name' is no name"),
        ({"hook_timeout": 0}, "hook_timeout must be at least 1, found 0"),
        ({"publish": "later"}, "publish must be one of when-passed, staged, found 'later'"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, found 'tpu'"),
        ({"evaluation": " "}, "evaluation must not be empty"),
        (
            {"target": "sglang"},
            "target must be one of vllm, transformers, bitsandbytes, llama.cpp, found 'sglang'",
        ),
        ({"tensor_parallel": 0, "target": "vllm"}, "tensor_parallel must be at least 1, found 0"),
        (
            {"tensor_parallel": 2},
            "no target is named; name one of vllm, transformers, bitsandbytes, llama.cpp, or leave it out",
        ),
        ({"workers": 0}, "workers must be at least 1, found 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 1 or 0, found -1"),
        ({"replay": ""}, "replay must not be empty"),
        ({"source": None}, "source is required"),
        ({"output": ""}, "output must not be empty"),
        ({"rules": "*.down_proj"}, "rules must be a list of tables"),
        ({"rules": ["*.down_proj"]}, "rules must be a list of tables"),
        ({"method": "gptq"}, "gptq needs calibration text"),
        (
            {"method": "gptq", "calibration": "c", "format": "gguf", "outlier_columns": 2},
            "for which gguf files have no names",
        ),
        (
            {"method": "gptq", "calibration": "c", "format": "gguf", "outlier_weights": 2},
            "outlier_weights 2 adds tensors for which gguf files have no names",
        ),
        ({"outlier_weights": 101}, "outlier_weights must be at most 100, found 101"),
        ({"outlier_weights": -1}, "outlier_weights must be at least 0, found -1"),
        (
            {"scheme": "NF4_DQ", "scale_search": "mse"},
            "scales of scheme NF4_DQ .* follow from the whole weight",
        ),
        ({"group_size": 0, "refit_scales": True}, "refit_scales True cannot be: scales of scheme W4A16"),
        ({"worker_resources": "quant"}, "worker_resources must be name=value"),
        ({"worker_labels": "pool=a b"}, "worker_labels has pool=a b, which is no label"),
        ({"placement": "together"}, "placement must be one of pack, spread, strict-pack, strict-spread"),
        ({"gpu_model": "H100", "device": "cpu"}, "gpu_model H100 and device cpu exclude each other"),
        ({"gpu_model": "H100", "worker_labels": "ray.io/accelerator-type=A100"}, "give one of them"),
        ({"rules": [{"match": "*", "method": "gptq"}]}, "gptq needs calibration text"),
    ],
)
def test_options_from_wrong_value_names_it_and_what_is_allowed(wrong, said):
    with pytest.raises(RecipeError, match=said) as raised:
        options_from({**REQUEST, **wrong})
    assert raised.value.facts["option"] in {*wrong, "calibration"}


def test_options_from_missing_output_is_refused():
    with pytest.raises(RecipeError, match="output is required"):
        options_from({"source": "a", "method": "rtn"})


@pytest.mark.parametrize("value", [8, 64, 100_000, -1])
def test_group_size_range_and_whole_row_are_allowed(value):
    assert options_from({**REQUEST, "group_size": value}).group_size == value


def test_codebooks_go_into_the_layout_that_holds_them_unless_somebody_names_another():
    found = {
        name: options_from({**REQUEST, **named}).format
        for name, named in {
            "alone": {"scheme": "NF4"},
            "named": {"scheme": "NF4", "format": "gptq"},
            "integers": {"scheme": "W4A16"},
        }.items()
    }
    assert found == {"alone": "bitsandbytes", "named": "gptq", "integers": "compressed-tensors"}


def test_no_checkpoints_can_be_asked_for():
    assert options_from({**REQUEST, "checkpoint_every": 0}).checkpoint_every == 0


@pytest.mark.parametrize(
    "name", ["work", "calibration", "workers", "device", "placement", "ray_address", "replay"]
)
def test_none_means_decided_by_the_plan(name):
    assert getattr(options_from({**REQUEST, name: None}), name) is None


def test_equal_rules_from_different_front_ends_give_equal_options():
    from_file = options_from({**REQUEST, "rules": [{"match": "*.o_proj", "group_size": 32}]})
    from_form = options_from(
        {
            **REQUEST,
            "rules": (
                {"match": "*.o_proj", "scheme": None, "group_size": 32, "method": None, "keep": False},
            ),
        }
    )
    assert from_file == from_form


def test_every_option_is_described_and_has_a_known_kind():
    for name, (found, option) in option_fields().items():
        assert option.help.endswith((".", "text")), name
        assert option.section, name
        assert kind_of(found) in (str, int, float, bool, tuple), name
        assert (found.default is None) == is_optional(found), name


def test_formats_to_choose_from_are_those_there_are():
    assert option_fields()["format"][1].choices == tuple(FORMATS)


def test_identity_holds_what_is_asked_of_the_weights_and_nothing_of_where_and_by_whom():
    kept = {name for name, (_, option) in option_fields().items() if option.in_identity}
    asked = {"scheme", "group_size", "method", "format", "propagation", "rules"}
    assert kept == asked | {
        "correct_targets",
        "scale_search",
        "column_order",
        "descent_passes",
        "refit_scales",
        "outlier_columns",
        "outlier_weights",
        "tf32_feedback",
        "correct_biases",
        "calibration_routing",
        "expert_shrinkage",
    }


_PLAIN = ("original", False, 0, False, "hessian")
_POLISHED = ("original", False, 2, True, "hessian")
_CORRECTED = ("quantized", True, 2, True, "inverse-hessian")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"scheme": "W4A16"}, _PLAIN),
        ({"scheme": "W8A16_ASYM"}, _PLAIN),
        ({"scheme": "W5A16"}, _PLAIN),
        ({"scheme": "W6A16_ASYM"}, _PLAIN),
        ({"scheme": "W3A16"}, _CORRECTED),
        ({"scheme": "W2A16_ASYM"}, _POLISHED),
        ({"scheme": "W3A16", "scale_search": "mse"}, (*_CORRECTED[:4], "mse")),
        ({"scheme": "W3A16", "method": "rtn"}, _PLAIN),
        ({"scheme": "W3A16", "propagation": "original"}, ("original", False, 2, True, "inverse-hessian")),
        (
            {"scheme": "W3A16", "correct_targets": False, "descent_passes": 0},
            ("quantized", False, 0, True, "inverse-hessian"),
        ),
        ({"scheme": "W4A16", "propagation": "quantized"}, ("quantized", False, 0, False, "hessian")),
        ({"scheme": "W4A16", "correct_targets": True}, ("quantized", True, 0, False, "hessian")),
    ],
)
def test_options_choices_that_nobody_made_follow_the_scheme(given, wanted):
    found = options_from({**REQUEST, "method": "gptq", "calibration": "text.jsonl", **given})
    names = ("propagation", "correct_targets", "descent_passes", "refit_scales", "scale_search")
    assert tuple(getattr(found, name) for name in names) == wanted


def test_options_corrected_targets_are_refused_on_original_activations_below_4_bits_too():
    with pytest.raises(RecipeError, match="correct_targets needs propagation quantized, found original"):
        options_from({**REQUEST, "scheme": "W3A16", "propagation": "original", "correct_targets": True})


def test_options_the_format_follows_the_target_unless_it_is_named():
    assert options_from({**REQUEST, "target": "vllm"}).format == "compressed-tensors"
    assert options_from({**REQUEST, "target": "vllm", "format": "gptq"}).format == "gptq"


def test_options_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        options_from(REQUEST).scheme = "W8A16"  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(options_from(REQUEST), JobOptions)
