"""AWQ files of other tools: captured ones, and others packed here by a slow packer, against their levels."""

import json
from pathlib import Path

import pytest
import torch

from quantlib.errors import CheckpointError
from quantlib.packing import awq_format
from tests.support.awq_decoder import decoded_levels, words_of_awq
from tests.support.quantized_sources import (
    captured_tensor,
    opened,
    read_in_short_runs,
    read_source,
    write_source,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "autoawq" / "w4.json"
LINEAR = "model.layers.0.mlp.gate_proj"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def words_tensor(lines):
    """int32 words of lines of codes, one row a line."""
    words = [words_of_awq(line) for line in lines.tolist()]
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def awq_tensors(rows, columns, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{LINEAR}.qweight": words_tensor(torch.randint(0, 16, (columns, rows), generator=generator)),
        f"{LINEAR}.qzeros": words_tensor(torch.randint(0, 16, (groups, rows), generator=generator)),
        f"{LINEAR}.scales": (torch.rand(groups, rows, generator=generator) + 0.01).half(),
    }


@pytest.mark.parametrize(("rows", "columns", "groups"), [(64, 96, 3), (296, 64, 2), (8, 5, 1), (136, 6, 6)])
def test_levels_are_those_of_the_layout(tmp_path, rows, columns, groups):
    stored = awq_tensors(rows, columns, groups)
    folder = write_source(tmp_path, stored, AWQ, {"dtype": "float16"})
    wanted = torch.tensor(decoded_levels(stored, LINEAR))
    found = read_in_short_runs(folder)
    assert set(found) == {f"{LINEAR}.weight"}
    assert torch.equal(found[f"{LINEAR}.weight"], wanted.half())
    assert torch.equal(read_in_short_runs(folder, levels_dtype="F32")[f"{LINEAR}.weight"], wanted)


def test_file_of_autoawq_has_the_levels_it_has_there(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    stored = {key: captured_tensor(tensor) for key, tensor in golden["tensors"].items()}
    folder = write_source(tmp_path, stored, golden["quantization_config"], {"dtype": "float16"})
    found = read_source(folder)
    assert torch.equal(found[golden["linear"] + ".weight"], captured_tensor(golden["levels"]))


def test_tensors_of_autoawq_are_unpacked_and_packed_again_to_the_same_bytes():
    golden = json.loads(GOLDEN.read_text())
    stored = {key: captured_tensor(tensor) for key, tensor in golden["tensors"].items()}
    scheme = awq_format.scheme_of(golden["quantization_config"], golden["linear"])
    read = awq_format.unpack(golden["linear"], stored, scheme)
    assert torch.equal(read.dequantize().half(), captured_tensor(golden["levels"]))
    again = awq_format.pack(golden["linear"], read)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize("given", [{"version": "GEMM"}, {"version": None}, {"zero_point": False}])
def test_zero_points_are_read_whatever_else_the_config_says(tmp_path, given):
    stored = awq_tensors(16, 64, 2)
    folder = write_source(tmp_path, stored, {**AWQ, **given}, {"dtype": "float32"})
    wanted = torch.tensor(decoded_levels(stored, LINEAR))
    assert torch.equal(read_source(folder)[f"{LINEAR}.weight"], wanted)


@pytest.mark.parametrize(
    ("changed", "quantization", "said"),
    [
        ({}, {"version": "gemv"}, "version gemm are read, got 'gemv'; give the original"),
        ({}, {"version": None, "format": "gemv_fast"}, "format gemm are read"),
        ({}, {"backend": "llm-awq"}, "llm-awq"),
        ({"qzeros": None}, {}, "has codes and scales of an awq linear"),
        ({"qweight": None}, {}, "has zeros and scales of an awq linear"),
        ({"scales": torch.ones(3, 16).half()}, {}, "do not fit each other"),
        ({"scales": torch.ones(32).half()}, {}, "do not fit each other"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, {}, "do not fit each other"),
        ({"qzeros": torch.zeros(0, 2, dtype=torch.int32), "scales": torch.ones(0, 16)}, {}, "do not fit"),
        ({"qweight": torch.zeros(63, 2, dtype=torch.int32)}, {}, "do not fit each other"),
        ({"qweight": torch.zeros(0, 2, dtype=torch.int32)}, {}, "do not fit each other"),
        ({"qweight": torch.zeros(64, 2, dtype=torch.int16)}, {}, r"codes I16 \[64, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_opened(tmp_path, changed, quantization, said):
    stored = awq_tensors(16, 64, 2) | {f"{LINEAR}.{name}": tensor for name, tensor in changed.items()}
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=said):
        opened(write_source(tmp_path, stored, {**AWQ, **quantization}))


def test_activation_with_scales_of_its_own_is_refused(tmp_path):
    stored = awq_tensors(16, 64, 2) | {"model.layers.0.mlp.act.scales": torch.ones(16).half()}
    with pytest.raises(CheckpointError, match=r"mlp\.act has scales of an awq linear"):
        opened(write_source(tmp_path, stored, AWQ))
