"""Outputs in small floats: written, verified, evaluated, read again, interrupted or not."""

import json
import math
from pathlib import Path

import pytest
import torch

from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.packing import compressed_tensors_format
from quantlib.storage import open_store
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text
from tests.support.tiny_models import read_all_tensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# One of each layout in a block, and what is kept.
_RULES = (
    {"match": "*.[qkv]_proj", "scheme": "FP8A16"},
    {"match": "*.o_proj", "scheme": "MXFP8A16", "method": "rtn"},
    {"match": "*.down_proj", "scheme": "W4A16", "group_size": 16},
    {"match": "*.1.mlp.*", "keep": True},
)
_WHOLE_RULES = (
    {"match": "*.o_proj", "scheme": "FP8A16_BLOCK", "method": "rtn"},
    {"match": "*.down_proj", "scheme": "W8A16_ASYM", "group_size": 0},
)
_RECIPES = {
    "FP8A16": {"scheme": "FP8A16", "group_size": None},
    "MXFP4A16": {"scheme": "MXFP4A16", "group_size": None},
    "NVFP4A16": {"scheme": "NVFP4A16", "group_size": None},
    "tensors": {"scheme": "FP8A16_TENSOR", "group_size": None, "rules": _WHOLE_RULES},
    "mixed": {"scheme": "MXFP4A16", "group_size": None, "rules": _RULES},
    "quantized": {"scheme": "MXFP4A16", "group_size": None, "propagation": "quantized", "descent_passes": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Recipe -> folder with its output; the source is beside it."""
    root = tmp_path_factory.mktemp("floats")
    tiny_source(root / "source", hidden_size=64, intermediate_size=96)
    for seed, name in enumerate(("calibration", "evaluation"), start=1):
        tiny_text(root / f"{name}.jsonl", seed=seed)
    made: dict[str, Path] = {}

    def folder_of(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = root / recipe
            quantize(tiny_options(root, output=str(root / recipe), **_RECIPES[recipe]))
        return made[recipe]

    return folder_of


@pytest.mark.parametrize("recipe", _RECIPES)
def test_output_is_accounted_for_and_evaluates_as_it_was_measured(finished, recipe):
    output = finished(recipe)
    source = output.parent / "source"
    result = verify_checkpoint(open_store("file:///"), f"file://{output}", f"file://{source}")
    assert result.findings == ()
    report = json.loads((output / "quantmill_report.json").read_text())
    assert [found["count"] for found in report["tensors"]] == [found.count for found in result.accounts]
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    weights = [
        name for name in read_all_tensors(source) if ".layers." in name and name.endswith("proj.weight")
    ]
    schemes = {n: compressed_tensors_format.scheme_of(config, n.removesuffix(".weight")) for n in weights}
    quantized = sum(account.count for account in result.accounts if account.state == "quantized")
    assert quantized == sum(scheme is not None for scheme in schemes.values())
    measured = evaluate_checkpoint(
        str(output),
        f"file://{output.parent}/evaluation.jsonl",
        text_column="text",
        sequences=5,
        sequence_length=32,
        threads=1,
        device="cpu",
    )
    told = report["evaluation"]["perplexity_quantized"]
    assert math.isclose(measured["perplexity"], told, rel_tol=1e-5)


def test_damaged_value_of_an_8_bit_weight_is_found(finished, tmp_path):
    output = finished("FP8A16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert read_all_tensors(output)[name].dtype == torch.float8_e4m3fn
    copy = tmp_path / "output"
    copy.mkdir()
    for path in output.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    (config,) = [json.loads((copy / "config.json").read_text())]
    config["quantization_config"]["ignore"].append(name.removesuffix(".weight"))
    (copy / "config.json").write_text(json.dumps(config))
    source = f"file://{output.parent}/source"
    findings = verify_checkpoint(open_store("file:///"), f"file://{copy}", source).findings
    assert any("up_proj" in finding and "not quantized" in finding for finding in findings)


@pytest.mark.parametrize(
    ("recipe", "ending"), [("NVFP4A16", "weight_global_scale"), ("tensors", "weight_scale")]
)
def test_linears_that_engines_fuse_share_what_belongs_to_whole_weights(finished, recipe, ending):
    written = read_all_tensors(finished(recipe))
    for block in (0, 1):
        of_block = {
            name: written[f"model.layers.{block}.{name}.{ending}"].tolist()
            for name in (
                *(f"self_attn.{part}_proj" for part in "qkv"),
                *(f"mlp.{part}_proj" for part in ("gate", "up")),
            )
        }
        attention = [values for name, values in of_block.items() if name.startswith("self_attn")]
        mlp = [values for name, values in of_block.items() if name.startswith("mlp")]
        assert len({tuple(x) for x in attention}) == len({tuple(x) for x in mlp}) == 1
        assert attention[0] != mlp[0]


@pytest.mark.parametrize("recipe", ["FP8A16", "NVFP4A16", "tensors", "mixed"])
def test_output_read_as_a_source_has_the_levels_that_were_written(finished, recipe):
    output = finished(recipe)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    store, written = open_store("file:///"), read_all_tensors(output)
    # The readers of sources share nothing with the packers.
    source = open_source(store, f"file://{output}", levels_dtype="F32")
    for name in source.decoded:
        linear = name.removesuffix(".weight")
        scheme = compressed_tensors_format.scheme_of(config, linear)
        wanted = compressed_tensors_format.unpack(linear, written, scheme).dequantize()
        assert torch.equal(read_tensors(store, source, [name])[name], wanted), name
    assert len(source.decoded) == sum(name.endswith("weight_scale") for name in written)


@pytest.mark.parametrize("recipe", ["NVFP4A16", "tensors", "mixed", "quantized"])
def test_several_workers_of_which_one_is_lost_write_the_same_bytes(finished, recipe):
    output = finished(recipe)
    cluster = ThreadCluster(3)
    cluster.kill_at("solve", 4)
    report = convert_on(cluster, tiny_options(output.parent, output=f"{output}-three", **_RECIPES[recipe]))
    assert len(report["history"]["renewals"]) == 1
    assert shard_digests(Path(f"{output}-three")) == shard_digests(output)
