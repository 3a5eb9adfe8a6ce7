import json

import numpy as np
import pytest

from quantlib.checkpoint.inspect import format_inspection, inspect_checkpoint
from quantlib.storage import open_store
from tests.support.checkpoints import CONFIG, small_tensors, write_checkpoint


def _inspect(folder):
    return inspect_checkpoint(open_store("file:///"), f"file://{folder}")


def test_original_checkpoint_is_counted(tmp_path):
    tensors = write_checkpoint(tmp_path)
    found = _inspect(tmp_path)
    assert found == json.loads(json.dumps(found))
    assert found["num_parameters"] == sum(values.size for _, values in tensors.values())
    assert found["num_tensors"] == len(tensors)
    assert (found["model_type"], found["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert found["quantization"] is None
    assert found["dtypes"]["BF16"] == {"tensors": 9, "size_bytes": 2 * (80 + 2 * (8 + 128 + 128 + 64))}
    assert sum(d["size_bytes"] for d in found["dtypes"].values()) == found["tensor_bytes"]
    assert [s["name"] for s in found["shards"]] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_packed_weights_count_as_the_parameters_they_stand_for(tmp_path):
    tensors = small_tensors()
    full = sum(values.size for _, values in tensors.values())
    module = "model.layers.0.mlp.up_proj"
    del tensors[f"{module}.weight"]
    tensors[f"{module}.weight_packed"] = "I32", np.zeros((16, 1), np.int32)
    tensors[f"{module}.weight_scale"] = "BF16", np.zeros((16, 1), np.uint16)
    weights = {"num_bits": 4, "group_size": 128, "symmetric": True, "type": "int"}
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    write_checkpoint(tmp_path, tensors, config={**CONFIG, "quantization_config": block})
    found = _inspect(tmp_path)
    assert found["num_parameters"] == full
    assert found["quantization"] == {
        "method": "compressed-tensors",
        "format": "pack-quantized",
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
    }


def test_gptq_block_is_summarized(tmp_path):
    block = {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": False, "checkpoint_format": "gptq"}
    write_checkpoint(tmp_path, config={**CONFIG, "quantization_config": block})
    assert _inspect(tmp_path)["quantization"] == {
        "method": "gptq",
        "format": "gptq",
        "bits": 8,
        "group_size": 64,
        "symmetric": False,
    }


@pytest.mark.parametrize("names", [("bits", "group_size"), ("w_bit", "q_group_size")])
def test_awq_block_is_summarized(tmp_path, names):
    block = {
        "quant_method": "awq",
        "zero_point": True,
        "version": "gemm",
        **dict(zip(names, (4, 128), strict=True)),
    }
    write_checkpoint(tmp_path, config={**CONFIG, "quantization_config": block})
    assert _inspect(tmp_path)["quantization"] == {
        "method": "awq",
        "format": "gemm",
        "bits": 4,
        "group_size": 128,
        "symmetric": None,
    }


def test_odd_quantization_blocks_do_not_stop_the_inspection(tmp_path):
    for block in ([], "x", {}, {"bits": "four", "config_groups": [1]}, {"config_groups": {"g": None}}):
        write_checkpoint(tmp_path, config={**CONFIG, "quantization_config": block})
        assert "quantization" in format_inspection(_inspect(tmp_path))


def test_text_shows_every_figure_a_person_asks_for(tmp_path):
    write_checkpoint(tmp_path)
    text = format_inspection(_inspect(tmp_path))
    for words in (
        str(tmp_path),
        "LlamaForCausalLM (llama)",
        "hidden size 8",
        "in 12 tensors",
        "3 shards",
        "BF16",
    ):
        assert words in text
    assert "quantization  none" in text
