"""The decoder that judges all tools finds what is in a file, and a tool that is not there has its row."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from safetensors.torch import save_file

from quantlib.errors import CheckpointError
from quantlib.packing import compressed_tensors_format, gptq_format
from quantlib.schemes import WHOLE_ROW, WeightScheme
from tests.benchmarks.checkpoint_levels import model_of_levels, read_levels
from tests.benchmarks.peer_environments import make_environment
from tests.benchmarks.peers import PeerRows, main
from tests.support.random_linears import random_quantized
from tests.support.tiny_jobs import tiny_source, tiny_text
from tests.support.tiny_models import read_all_tensors, save_tiny_checkpoint, tiny_config, tiny_model

NAME = "model.layers.0.mlp.down_proj"


def write_quantized(folder: Path, tensors: dict[str, torch.Tensor], settings: dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, WHOLE_ROW])
@pytest.mark.parametrize("layout", [compressed_tensors_format, gptq_format])
def test_levels_of_our_file_are_those_of_the_codes(tmp_path, layout, group_size, is_symmetric, bits):
    scheme = WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)
    quantized = random_quantized(64, 96, scheme, scale_dtype=torch.float16, seed=bits)
    kept = torch.randn(5, 7).to(torch.bfloat16)
    folder = write_quantized(
        tmp_path,
        {"model.norm.weight": kept, **layout.pack(NAME, quantized)},
        layout.quantization_config({NAME: scheme}),
    )
    found = read_levels(folder)
    assert set(found) == {"model.norm.weight", f"{NAME}.weight"}
    assert torch.equal(found["model.norm.weight"], kept.float())
    assert torch.equal(found[f"{NAME}.weight"], quantized.dequantize())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_levels_of_an_upstream_file_are_those_that_were_compressed(tmp_path, is_symmetric, bits):
    generator = torch.Generator().manual_seed(bits)
    code = torch.randint(0, 2**bits, (40, 96), generator=generator)
    zero = torch.randint(0, 2**bits, (40, 3), generator=generator)
    if is_symmetric:
        zero = torch.full((40, 3), 2 ** (bits - 1))
    scale = torch.rand(40, 3, generator=generator) + 0.01
    levels = scale.repeat_interleave(32, 1) * (code - zero.repeat_interleave(32, 1))
    weights = QuantizationArgs(
        num_bits=bits, symmetric=is_symmetric, strategy=QuantizationStrategy.GROUP, group_size=32
    )
    group = QuantizationScheme(targets=["Linear"], weights=weights)
    state: dict[str, torch.Tensor | None] = {"weight": levels, "weight_scale": scale}
    if not is_symmetric:
        state["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
    packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, group)
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group.model_dump(mode="json")},
    }
    tensors = {f"{NAME}.{name}": tensor for name, tensor in packed.items() if tensor is not None}
    folder = write_quantized(tmp_path, tensors, settings)
    assert torch.equal(read_levels(folder)[f"{NAME}.weight"], levels)


def test_gptq_columns_take_the_scale_of_the_group_they_name(tmp_path):
    scheme = WeightScheme(bits=4, is_symmetric=True, group_size=32)
    quantized = random_quantized(32, 64, scheme, scale_dtype=torch.float16)
    tensors = gptq_format.pack(NAME, quantized)
    groups_C = torch.tensor([1, 0] * 32, dtype=torch.int32)
    tensors[f"{NAME}.g_idx"] = groups_C
    folder = write_quantized(tmp_path, tensors, gptq_format.quantization_config({NAME: scheme}))
    wanted = quantized.scale_RG.float()[:, groups_C] * (quantized.codes_RC.float() - 8)
    assert torch.equal(read_levels(folder)[f"{NAME}.weight"], wanted)


def test_words_that_do_not_fit_the_shape_are_refused(tmp_path):
    scheme = WeightScheme(bits=4, is_symmetric=True, group_size=32)
    quantized = random_quantized(32, 64, scheme, scale_dtype=torch.float16)
    settings = gptq_format.quantization_config({NAME: scheme}) | {"bits": 8}
    folder = write_quantized(tmp_path, gptq_format.pack(NAME, quantized), settings)
    with pytest.raises(CheckpointError, match="64 fields of 8 bits take 16 int32 words a line, found 8"):
        read_levels(folder)


def test_unknown_layout_is_refused(tmp_path):
    folder = write_quantized(tmp_path, {"a": torch.ones(1)}, {"quant_method": "awq", "bits": 4})
    with pytest.raises(CheckpointError, match="not known here.*awq"):
        read_levels(folder)


@pytest.mark.parametrize("is_tied", [True, False])
def test_model_of_levels_holds_the_checkpoint_and_nothing_else(tmp_path, is_tied):
    folder = save_tiny_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=is_tied, seed=7)
    wanted = tiny_model(tiny_config("llama", tie_word_embeddings=is_tied), seed=7)
    found = model_of_levels(folder, folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())
    assert set(found) == set(wanted.state_dict())


def test_model_of_levels_lacking_a_tensor_is_refused(tmp_path):
    source = save_tiny_checkpoint(tmp_path / "source", "llama")
    tensors = read_all_tensors(source)
    tensors["model.foreign"] = tensors.pop("model.norm.weight")
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"missing \['model.norm.weight'\], foreign \['model.foreign'\]"
    ):
        model_of_levels(source, tmp_path / "other")


def test_environment_that_cannot_be_made_says_why(tmp_path):
    (tmp_path / "taken").write_text("no folder")
    found = make_environment("peer", ("nothing==1",), tmp_path / "taken")
    assert found.failure is not None
    assert found.failure.startswith("not installed: ")
    assert "taken" in found.failure


def row(side: str, seconds: float, **values) -> dict:
    return {
        "key": {"side": side, "setting": SETTING},
        "label": side,
        "cost": {"cpu_seconds": seconds, "wall_seconds": 2 * seconds, "peak_rss_bytes": 2**30},
        "cpu_seconds": {"set_up": seconds / 4, "quantize": seconds / 2, "save": seconds / 4},
        "gflop_per_cpu_second": 80.4,
        "size_bytes": 5_000_000,
        "perplexity": 16.5,
        "ratio": 1.1,
        "ratio_standard_error": 0.01,
        **values,
    }


SETTING = {"model": "tiny", "bits": 4, "group_size": 64, "sequences": 8, "sequence_length": 32}
SETTING |= {"evaluation_sequences": 4, "threads": 1}


def test_table_sets_seconds_against_ours_and_forgets_failures_when_started_again(tmp_path):
    rows = PeerRows(tmp_path / "table.md")
    rows.add(row("quantmill", 10.0))
    rows.add(row("slow", 30.0))
    rows.add_failed(
        {"key": {"side": "gone", "setting": SETTING}, "label": "gone", "failure": "not installed: x"}
    )
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| slow | 30.0 | 3.00 | 22.5 | 3.00 | 80 | 60 | 1.00 | 5.0 | 16.500 | 1.1000 | 0.0100 |" in lines
    gone = next(line for line in lines if line.startswith("| gone | not installed: x |"))
    assert gone.count("|") == lines[4].count("|")
    again = PeerRows(tmp_path / "table.md")
    again.write_table()
    assert "gone" not in (tmp_path / "table.md").read_text()
    assert [found["key"]["side"] for found in again.all] == ["quantmill", "slow"]


@pytest.mark.slow
def test_peers_goes_on_without_a_tool_that_cannot_be_installed(tmp_path, capsys):
    model = tiny_source(tmp_path / "model")
    texts = [tiny_text(tmp_path / f"{name}.jsonl", seed=n) for n, name in enumerate(("one", "two"))]
    (tmp_path / "taken").write_text("no folder")
    given = ["--model", str(model), "--calibration", str(texts[0]), "--evaluation", str(texts[1])]
    given += ["--sequences", "4", "--sequence-length", "32", "--evaluation-sequences", "3"]
    given += ["--group-size", "32", "--environments", str(tmp_path / "taken")]
    given += ["--runs", str(tmp_path / "runs")]
    given += ["--sides", "gptqmodel", "quantmill", "--output", str(tmp_path / "table.md")]
    assert main(given) == 1
    table = (tmp_path / "table.md").read_text()
    assert "| not installed: " in table
    kept = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [found["key"]["side"] for found in kept] == ["source", "quantmill"]
    ours = kept[1]
    assert ours["cpu_seconds"]["quantize"] < ours["cost"]["cpu_seconds"]
    assert 0.5 < ours["ratio"] < 2.0
    assert ours["ratio"] != 1.0
    assert main(given[:-4] + ["quantmill", "--output", str(tmp_path / "table.md")]) == 0
    assert "quantmill: there already" in capsys.readouterr().out
