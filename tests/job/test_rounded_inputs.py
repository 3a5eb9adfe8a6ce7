"""Outputs whose linears round their inputs: written, evaluated as engines run them, read by transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlib.calibration.corpus import load_tokenizer, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.job.evaluation_text import format_evaluation
from quantlib.packing import compressed_tensors_format
from quantlib.schemes import scheme_from_name
from quantlib.storage import open_store
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text
from tests.support.tiny_models import read_all_tensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

_OWN = {"group_size": None}
_RULES = (
    {"match": "*.[qkv]_proj", "scheme": "FP8_DYNAMIC"},
    {"match": "*.o_proj", "scheme": "MXFP8", "method": "rtn"},
    {"match": "*.0.mlp.down_proj", "scheme": "MXFP4A16"},
    {"match": "*.1.mlp.*", "keep": True},
)
_RECIPES = {
    "W8A8": {"scheme": "W8A8", **_OWN},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC", **_OWN},
    "FP8_DYNAMIC_TENSOR": {"scheme": "FP8_DYNAMIC_TENSOR", **_OWN},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK", "method": "rtn", **_OWN},
    "MXFP4": {"scheme": "MXFP4", **_OWN},
    "MXFP8": {"scheme": "MXFP8", "method": "rtn", **_OWN},
    "mixed": {"scheme": "W8A8", "rules": _RULES, **_OWN},
    "quantized": {"scheme": "MXFP4", "propagation": "quantized", "correct_targets": True, **_OWN},
}
# The same weights, whose inputs stay as they are.
_TWINS = {
    "W8A8": {"scheme": "W8A16", "group_size": -1},
    "FP8_DYNAMIC": {"scheme": "FP8A16", **_OWN},
    "FP8_DYNAMIC_TENSOR": {"scheme": "FP8A16_TENSOR", **_OWN},
    "FP8_BLOCK": {"scheme": "FP8A16_BLOCK", "method": "rtn", **_OWN},
    "MXFP4": {"scheme": "MXFP4A16", **_OWN},
    "MXFP8": {"scheme": "MXFP8A16", "method": "rtn", **_OWN},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Recipe -> folder with its output; the source is beside it."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_source(root / "source", hidden_size=128, intermediate_size=128)
    for seed, name in enumerate(("calibration", "evaluation"), start=1):
        tiny_text(root / f"{name}.jsonl", seed=seed)
    made: dict[str, Path] = {}

    def folder_of(name: str, recipe: dict) -> Path:
        if name not in made:
            made[name] = root / name
            quantize(tiny_options(root, output=str(root / name), **recipe))
        return made[name]

    return folder_of


def told(output):
    return json.loads((output / "quantmill_report.json").read_text())["evaluation"]


def evaluated(output):
    return evaluate(output, output.parent)


def evaluate(output, texts):
    return evaluate_checkpoint(
        str(output),
        f"file://{texts}/evaluation.jsonl",
        text_column="text",
        sequences=5,
        sequence_length=32,
        threads=1,
        device="cpu",
    )


@pytest.mark.parametrize("recipe", _RECIPES)
def test_output_evaluates_as_it_was_measured(finished, recipe):
    output = finished(recipe, _RECIPES[recipe])
    source = f"file://{output.parent}/source"
    assert verify_checkpoint(open_store("file:///"), f"file://{output}", source).findings == ()
    measured = evaluated(output)
    assert math.isclose(measured["perplexity"], told(output)["perplexity_quantized"], rel_tol=1e-5)
    assert measured["unknown_inputs"] == {}
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    counts: dict[str, int] = {}
    for name in read_all_tensors(output.parent / "source"):
        if ".layers." in name and name.endswith("proj.weight"):
            scheme = compressed_tensors_format.scheme_of(config, name.removesuffix(".weight"))
            if scheme is not None and scheme.inputs is not None:
                counts[str(scheme.inputs)] = counts.get(str(scheme.inputs), 0) + 1
    assert measured["rounded_inputs"] == counts


@pytest.mark.parametrize("name", _TWINS)
def test_weights_are_those_of_the_twin_and_the_figures_are_not(finished, name):
    output, twin = finished(name, _RECIPES[name]), finished(f"{name}-twin", _TWINS[name])
    mine, others = read_all_tensors(output), read_all_tensors(twin)
    if name == "W8A8":  # the one whose layout differs
        for linear in [key.removesuffix(".weight_scale") for key in others if key.endswith("weight_scale")]:
            levels = [
                compressed_tensors_format.unpack(linear, tensors, scheme).dequantize()
                for tensors, scheme in (
                    (mine, scheme_from_name("W8A8")),
                    (others, scheme_from_name("W8A16", -1)),
                )
            ]
            assert torch.equal(*levels)
    else:
        assert shard_digests(output) == shard_digests(twin)
    rounded, plain = (told(folder)["kl_divergence"] for folder in (output, twin))
    assert rounded > 1.05 * plain


@pytest.mark.parametrize("name", _TWINS)
def test_transformers_has_the_perplexity_that_was_told(finished, name):
    output, store = finished(name, _RECIPES[name]), open_store("file:///")
    rows_BT = token_rows(
        read_documents(f"file://{output.parent}/evaluation.jsonl", "text"),
        load_tokenizer(store, open_source(store, f"file://{output}")),
        num_sequences=5,
        sequence_length=32,
        seed=0,
    ).long()
    # compressed-tensors unpacks powers of two to bf16, exactly, and wants a model of that dtype.
    dtype = torch.bfloat16 if name.startswith("MX") else torch.float32
    model, notes = AutoModelForCausalLM.from_pretrained(output, dtype=dtype, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    with torch.no_grad():
        model(rows_BT[:1])
        # Weights are unpacked now; of a quantized model transformers refuses its own `float`.
        torch.nn.Module.float(model)
        losses = [model(row[None], labels=row[None]).loss.item() for row in rows_BT]
    perplexity, ours = math.exp(sum(losses) / len(losses)), evaluated(output)
    assert ours["rounded_inputs"] == {str(scheme_from_name(name).inputs): 21}
    assert math.isclose(perplexity, ours["perplexity"], rel_tol=1e-5)
    plain = evaluated(finished(f"{name}-twin", _TWINS[name]))
    assert abs(perplexity - ours["perplexity"]) < 0.1 * abs(perplexity - plain["perplexity"])


def test_experts_round_the_tokens_that_chose_them(tmp_path):
    tiny_source(tmp_path / "source", "qwen3_moe", moe_intermediate_size=32, mlp_only_layers=[])
    for seed, name in enumerate(("calibration", "evaluation"), start=1):
        tiny_text(tmp_path / f"{name}.jsonl", seed=seed)
    figures = {}
    for name in ("W8A8", "W8A8-twin"):
        recipe = {**_RECIPES, "W8A8-twin": _TWINS["W8A8"]}[name]
        output = tmp_path / name
        quantize(tiny_options(tmp_path, output=str(output), method="rtn", **recipe))
        measured = evaluated(output)
        figures[name] = told(output)
        assert math.isclose(measured["perplexity"], figures[name]["perplexity_quantized"], rel_tol=1e-5)
    assert figures["W8A8"]["kl_divergence"] > 1.05 * figures["W8A8-twin"]["kl_divergence"]


def test_inputs_rounded_in_a_way_that_is_not_known_are_left_and_told(finished, tmp_path):
    output = finished("W8A8", _RECIPES["W8A8"])
    copy = tmp_path / "output"
    shutil.copytree(output, copy)
    config = json.loads((copy / "config.json").read_text())
    values = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    values |= {"dynamic": False, "strategy": "tensor"}
    (copy / "config.json").write_text(json.dumps(config))
    measured = evaluate(copy, output.parent)
    assert measured["rounded_inputs"] == {}
    ((words, count),) = measured["unknown_inputs"].items()
    assert count == 21 and "strategy tensor, dynamic False" in words
    assert math.isclose(
        measured["perplexity"], evaluated(finished("W8A8-twin", _TWINS["W8A8"]))["perplexity"], rel_tol=1e-6
    )
    said = format_evaluation(measured).splitlines()
    assert said[1:] == [f"inputs of 21 linears left as they are; engines round them with {words}"]
    ours = format_evaluation(evaluated(output)).splitlines()
    assert ours[1:] == ["inputs of 21 linears rounded to 8-bit int by token, as engines do"]


@pytest.mark.parametrize("recipe", ["mixed", "quantized"])
def test_several_workers_of_which_one_is_lost_write_the_same(finished, recipe):
    output = finished(recipe, _RECIPES[recipe])
    cluster = ThreadCluster(3)
    cluster.kill_at("solve", 4)
    report = convert_on(cluster, tiny_options(output.parent, output=f"{output}-three", **_RECIPES[recipe]))
    assert len(report["history"]["renewals"]) == 1
    assert shard_digests(Path(f"{output}-three")) == shard_digests(output)
    assert report["evaluation"] == told(output)
