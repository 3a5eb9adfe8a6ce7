"""GPTQ files of other tools: captured ones, and others packed here by a slow packer, against their levels."""

import json
from pathlib import Path

import pytest
import torch

from quantlib.errors import CheckpointError
from tests.support.big_integers import words_of
from tests.support.quantized_sources import (
    captured_tensor,
    opened,
    read_in_short_runs,
    read_source,
    write_source,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "gptqmodel"
LINEAR = "model.layers.0.mlp.gate_proj"


def words_tensor(lines, bits):
    """int32 words of lines of codes, one row a line."""
    words = [words_of(line, bits) for line in lines.tolist()]
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def gptq_values(rows, columns, bits, groups, seed=0):
    """codes [R, C], zeros [G, R] of 1 and more, scales [G, R], group of each column in random order."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, rows), generator=generator)
    scales = (torch.rand(groups, rows, generator=generator) + 0.01).half()
    order = torch.arange(columns) * groups // columns
    return codes, zeros, scales, order[torch.randperm(columns, generator=generator)]


def stored_as(codes, stored_zeros, scales, g_idx, bits):
    return {
        f"{LINEAR}.qweight": words_tensor(codes, bits).T,
        f"{LINEAR}.qzeros": words_tensor(stored_zeros, bits),
        f"{LINEAR}.scales": scales,
        f"{LINEAR}.g_idx": g_idx.int(),
    }


def levels(codes, zeros, scales, g_idx):
    """As the layout is defined on paper, in fp32."""
    return ((codes - zeros.T[:, g_idx]) * scales.float().T[:, g_idx]).float()


@pytest.mark.parametrize("convention", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(64, 96, 3), (288, 64, 2), (160, 32, 1)])
def test_columns_in_any_order_have_the_scale_of_their_group(
    tmp_path, bits, convention, rows, columns, groups
):
    codes, zeros, scales, g_idx = gptq_values(rows, columns, bits, groups)
    stored = stored_as(codes, zeros - int(convention == "gptq"), scales, g_idx, bits)
    quantization = {"quant_method": "gptq", "sym": False, "desc_act": True, "checkpoint_format": convention}
    folder = write_source(tmp_path, stored, quantization, {"dtype": "float16"})
    wanted = levels(codes, zeros, scales, g_idx)
    found = read_in_short_runs(folder)
    assert set(found) == {f"{LINEAR}.weight"}
    assert torch.equal(found[f"{LINEAR}.weight"], wanted.half())
    assert torch.equal(read_in_short_runs(folder, levels_dtype="F32")[f"{LINEAR}.weight"], wanted)


@pytest.mark.parametrize("name", ["w3", "w4", "w8"])
def test_file_of_gptqmodel_has_the_levels_it_has_there(tmp_path, name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    stored = {key: captured_tensor(tensor) for key, tensor in golden["tensors"].items()}
    folder = write_source(tmp_path, stored, golden["quantization_config"], {"dtype": "float16"})
    found = read_source(folder)
    assert torch.equal(found[golden["linear"] + ".weight"], captured_tensor(golden["levels"]))


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_zero_points_of_0_are_read_as_they_were_lowered_word_by_word(tmp_path, bits, ones):
    codes, zeros, scales, g_idx = gptq_values(64, 32, bits, 2)
    zeros[:, ::3] = 0
    stored = stored_as(codes, zeros, scales, g_idx, bits)
    lowered = (words_tensor(zeros, bits).long() - ones) & 0xFFFFFFFF
    stored[f"{LINEAR}.qzeros"] = lowered.to(torch.uint32).view(torch.int32)
    folder = write_source(tmp_path, stored, {"quant_method": "gptq", "sym": False}, {"dtype": "float32"})
    assert torch.equal(read_source(folder)[f"{LINEAR}.weight"], levels(codes, zeros, scales, g_idx))


@pytest.mark.parametrize("stored_zero", [7, 8])
@pytest.mark.parametrize("convention", ["gptq", "gptq_v2"])
def test_symmetric_weights_have_the_middle_as_zero_in_either_convention(tmp_path, stored_zero, convention):
    codes, zeros, scales, _ = gptq_values(32, 64, 4, 2)
    consecutive = torch.arange(64) // 32
    stored = stored_as(codes, torch.full_like(zeros, stored_zero), scales, consecutive, 4)
    del stored[f"{LINEAR}.g_idx"]
    quantization = {"quant_method": "gptq", "sym": True, "checkpoint_format": convention}
    folder = write_source(tmp_path, stored, quantization, {"dtype": "float32"})
    wanted = levels(codes, torch.full_like(zeros, 8), scales, consecutive)
    assert torch.equal(read_source(folder)[f"{LINEAR}.weight"], wanted)


@pytest.mark.parametrize(
    ("changed", "quantization", "said"),
    [
        ({}, {"checkpoint_format": "marlin"}, "found 'marlin'"),
        ({}, {"pack_dtype": "int16"}, "in 'int16'"),
        ({"qzeros": None}, {}, "its qzeros or scales are not"),
        ({"scales": torch.ones(3, 32).half()}, {}, "do not fit each other"),
        ({"g_idx": torch.zeros(9, dtype=torch.int32)}, {}, "do not fit each other"),
        ({"qzeros": torch.zeros(2, 5, dtype=torch.int32)}, {}, "do not fit each other"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_opened(tmp_path, changed, quantization, said):
    codes, zeros, scales, g_idx = gptq_values(32, 64, 4, 2)
    stored = stored_as(codes, zeros, scales, g_idx, 4)
    stored |= {f"{LINEAR}.{name}": tensor for name, tensor in changed.items()}
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=said):
        opened(write_source(tmp_path, stored, {"quant_method": "gptq", **quantization}))


@pytest.mark.parametrize("bits", [5, 6])
def test_widths_that_are_bit_planes_elsewhere_are_refused_by_their_shapes(tmp_path, bits):
    stored = stored_as(*gptq_values(32, 64, bits, 2), bits)
    with pytest.raises(CheckpointError, match="do not fit each other as codes of 2, 3, 4, 8 bits"):
        opened(write_source(tmp_path, stored, {"quant_method": "gptq"}))


@pytest.mark.parametrize(
    ("zeros", "group", "said"),
    [(3, 0, "other than 8"), (8, 2, "groups 0 to 2, there are"), (8, -1, "groups -1 to 1")],
)
def test_content_that_cannot_be_is_told_when_it_is_read(tmp_path, zeros, group, said):
    codes, stored_zeros, scales, g_idx = gptq_values(32, 64, 4, 2)
    g_idx[5] = group
    stored = stored_as(codes, torch.full_like(stored_zeros, zeros), scales, g_idx, 4)
    folder = write_source(tmp_path, stored, {"quant_method": "gptq", "sym": True})
    with pytest.raises(CheckpointError, match=said):
        read_source(folder)
