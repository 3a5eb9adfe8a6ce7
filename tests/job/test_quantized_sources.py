"""Whole conversions of sources that are quantized already: the bytes are those of a dense source."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import CheckpointError
from quantlib.inprocess import quantize
from quantlib.job.planner import build_plan
from quantlib.storage import open_store
from tests.support.quantized_sources import requantized, write_source
from tests.support.tiny_gguf import Kind, tiny_gguf
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text
from tests.support.tiny_models import read_all_tensors, read_config


def _fp8(weight):
    scale = weight.float().unfold(0, 32, 32).unfold(1, 32, 32).abs().amax((2, 3)) / 448
    spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    restored = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    return {"weight": codes, "weight_scale_inv": scale}, restored


_INT4 = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=32, dynamic=False)
)


def _packed(weight):
    scale = weight.unflatten(1, (-1, 32)).abs().amax(2) / 7
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress({"weight": weight, "weight_scale": scale}, _INT4)
    return stored, compressor.decompress(dict(stored), _INT4)["weight"]


def _nf4(weight):
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    # A block a row: bitsandbytes 0.50 misreads on a CPU blocks that go on in the next row.
    state.shape = torch.Size((weight.numel() // 64, 64))
    return {"weight": packed, **stored}, bnb.dequantize_4bit(packed, state).reshape(weight.shape)


KINDS = {
    "fp8": (_fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "compressed-tensors": (
        _packed,
        QuantizationConfig(config_groups={"group_0": _INT4}, format="pack-quantized").model_dump(mode="json"),
    ),
    "bitsandbytes": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


def _pair(root: Path, kind: str) -> tuple[Path, Path]:
    """A quantized source, and a dense one of what the upstream library reads in it."""
    make, quantization = KINDS[kind]
    tiny_options(root)
    stored, levels = {}, {}
    for name, tensor in read_all_tensors(root / "source").items():
        if "_proj.weight" in name:
            parts, levels[name] = make(tensor)
            stored |= {name.replace("weight", "") + part: value for part, value in parts.items()}
    quantized = requantized(root / "source", root / "quantized", stored, quantization)
    dense = requantized(root / "source", root / "dense", levels, {})
    return quantized, dense


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_the_levels_and_says_what_the_source_was(tmp_path, kind, method):
    quantized, dense = _pair(tmp_path, kind)
    common = {"method": method, "format": "gptq"}
    options = tiny_options(tmp_path, source=str(quantized), output=str(tmp_path / "a"), **common)
    report = quantize(options)
    quantize(tiny_options(tmp_path, source=str(dense), output=str(tmp_path / "b"), **common))
    assert shard_digests(tmp_path / "a") == shard_digests(tmp_path / "b")
    assert report["source_format"] == kind
    provenance = json.loads((tmp_path / "a" / "quantmill_provenance.json").read_text())
    assert provenance["source"]["format"] == kind
    config = read_config(tmp_path / "a")
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert config == {**read_config(dense), "quantization_config": config["quantization_config"]}
    store = open_store("file:///")
    checked = verify_checkpoint(store, f"file://{tmp_path / 'a'}", source_uri=f"file://{quantized}")
    assert checked.findings == ()


def _mxfp4_source(tmp_path):
    """A tiny GPT-OSS whose experts are MXFP4, its dense twin, and the experts' parameters that are meant."""
    tiny_source(tmp_path / "source", "gpt_oss", num_hidden_layers=4)
    generator = torch.Generator().manual_seed(0)
    stored, levels, others = {}, {}, {}
    for name, tensor in read_all_tensors(tmp_path / "source").items():
        others[name] = tensor
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            levels[name] = convert_moe_packed_tensors(blocks, scales)
    assert levels
    source = requantized(tmp_path / "source", tmp_path / "q", stored, {"quant_method": "mxfp4"})
    dense = requantized(tmp_path / "source", tmp_path / "dense", {**others, **levels}, {})
    for corpus, seed in (("calibration", 1), ("evaluation", 2)):
        tiny_text(tmp_path / f"{corpus}.jsonl", seed=seed)
    return source, dense, levels


def test_mxfp4_experts_that_are_kept_are_written_as_the_parameters_they_stand_for(tmp_path):
    source, _, levels = _mxfp4_source(tmp_path)
    rules = [{"match": "*.experts.*", "keep": True}]
    report = quantize(tiny_options(tmp_path, source=str(source), method="rtn", rules=rules))
    assert report["source_format"] == "mxfp4"
    written = read_all_tensors(tmp_path / "output")
    assert all(torch.equal(written[name], wanted) for name, wanted in levels.items())
    assert not any(name.endswith(("_blocks", "_scales")) for name in written)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_mxfp4_experts_are_quantized_one_by_one_like_those_of_a_dense_source(tmp_path, method):
    source, dense, levels = _mxfp4_source(tmp_path)
    quantize(tiny_options(tmp_path, source=str(source), method=method))
    quantize(tiny_options(tmp_path, source=str(dense), output=str(tmp_path / "b"), method=method))
    assert shard_digests(tmp_path / "output") == shard_digests(tmp_path / "b")
    written = read_all_tensors(tmp_path / "output")
    assert "model.layers.3.mlp.experts.3.up_proj.weight_packed" in written
    assert not any(name in written for name in levels)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_gguf_gives_the_output_of_the_checkpoint_it_was_made_from(tmp_path, method):
    named = tiny_gguf(tmp_path / "m.gguf", kind_of=lambda name: Kind.BF16, file_type=32)
    for corpus, seed in (("calibration", 1), ("evaluation", 2)):
        tiny_text(tmp_path / f"{corpus}.jsonl", seed=seed)
    gguf_source = open_source(open_store("file:///"), f"file://{tmp_path / 'm.gguf'}")
    dense = write_source(
        tmp_path / "dense",
        {name: tensor.bfloat16() for name, tensor in named.items()},
        {},
        gguf_source.config,
    )
    for name, content in gguf_source.made_files.items():
        (dense / name).write_bytes(content)
    options = tiny_options(tmp_path, source=str(tmp_path / "m.gguf"), method=method)
    report = quantize(options)
    other = tiny_options(tmp_path, source=str(dense), output=str(tmp_path / "b"), method=method)
    assert report["evaluation"] == quantize(other)["evaluation"]
    assert shard_digests(tmp_path / "output") == shard_digests(tmp_path / "b")
    assert report["source_format"] == "gguf"
    assert "gguf" in report["versions"]
    assert report["bytes"]["source"] == (tmp_path / "m.gguf").stat().st_size
    files = {path.name: path.read_bytes() for path in dense.iterdir() if "token" in path.name}
    assert files == {name: (tmp_path / "output" / name).read_bytes() for name in files}
    assert quantize(options)["finished"] == report["finished"], "the finished output is known again"


@pytest.mark.parametrize(
    ("output_format", "scheme", "group_size"),
    [("gptq", "W8A16", 32), ("awq", "W4A16_ASYM", 32), ("bitsandbytes", "W8A16", -1)],
)
def test_an_output_can_be_the_source_of_another(tmp_path, output_format, scheme, group_size):
    first = tiny_options(tmp_path, method="rtn", scheme=scheme, format=output_format, group_size=group_size)
    quantize(first)
    second = tiny_options(
        tmp_path, source=first.output, output=str(tmp_path / "again"), method="rtn", scheme="W4A16"
    )
    report = quantize(second)
    assert report["source_format"] == output_format
    config = read_config(tmp_path / "again")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"


def test_plan_names_the_format_of_the_source_and_a_changed_one_is_another_job(tmp_path):
    quantized, _ = _pair(tmp_path, "fp8")
    options = tiny_options(tmp_path, source=str(quantized))
    plan, _ = build_plan(options, 1)
    assert plan.source_format == "fp8"
    config = read_config(quantized)
    config["quantization_config"]["weight_block_size"] = None
    (quantized / "config.json").write_text(json.dumps(config))
    assert build_plan(options, 1)[0].config_digest != plan.config_digest


def test_plan_refuses_what_is_not_understood(tmp_path):
    options = tiny_options(tmp_path)
    config = {**read_config(tmp_path / "source"), "quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by hqq, which is not read; read are fp8"):
        build_plan(options, 1)
