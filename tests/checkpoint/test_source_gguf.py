"""GGUF files: what llama.cpp's conversion does is undone, codes are read as transformers does."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantlib.calibration.corpus import load_tokenizer
from quantlib.checkpoint.inspect import format_inspection, inspect_checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.errors import CheckpointError, ObjectNotFoundError
from quantlib.model.families import open_config
from quantlib.storage import open_store
from tests.support.quantized_sources import with_short_runs
from tests.support.tiny_gguf import ARCHITECTURES, Kind, tiny_gguf

STORE = open_store("file:///")


def opened(path):
    return open_source(STORE, f"file://{path}")


def read(path):
    checkpoint = opened(path)
    return read_tensors(STORE, checkpoint, list(checkpoint.tensors))


def exact(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_fp32_file_gives_the_very_tensors_it_was_made_from(tmp_path, family):
    # transformers takes these widths of a head for granted, whatever the file says.
    heads = {"qwen3": {"head_dim": 128}, "qwen2_moe": {"head_dim": 64}}.get(family, {})
    named = tiny_gguf(tmp_path / "m.gguf", family, **heads)
    found = read(tmp_path / "m.gguf")
    assert set(found) == set(named)
    for name, tensor in named.items():
        # Gemma's norms went through plus and minus one in fp32.
        tolerance = 3e-7 if family == "gemma3_text" and name.endswith("norm.weight") else 0.0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


# Random codes have scales that are not finite, too.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "kind",
    [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.Q2_K, Kind.Q4_K, Kind.Q6_K],
    ids=lambda kind: kind.name,
)
def test_codes_are_read_as_transformers_reads_them(tmp_path, family, kind):
    path = tmp_path / "m.gguf"
    tiny_gguf(path, family, kind_of=lambda name: kind, file_type=15)
    model = AutoModelForCausalLM.from_config(open_config(opened(path).config))
    wanted = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    checkpoint = with_short_runs(opened(path))
    found = read_tensors(STORE, checkpoint, list(checkpoint.tensors))
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), tensor.bfloat16().view(torch.int16)), name


def test_codes_of_experts_are_those_of_each(tmp_path):
    path = tmp_path / "m.gguf"
    named = tiny_gguf(path, "qwen3_moe", kind_of=lambda name: Kind.Q8_0, file_type=7)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    codes = gguf.quants.quantize(named[name].numpy(), Kind.Q8_0)
    wanted = torch.from_numpy(gguf.quants.dequantize(codes, Kind.Q8_0)).bfloat16()
    assert torch.equal(read(path)[name], wanted)


def test_fp16_file_stays_fp16(tmp_path):
    named = tiny_gguf(tmp_path / "m.gguf", kind_of=lambda name: Kind.F16, file_type=1)
    name = "model.layers.1.mlp.down_proj.weight"
    found = read(tmp_path / "m.gguf")[name]
    assert torch.equal(found, named[name].half())


def test_config_says_what_the_model_is(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", "llama", file_type=2, tie_word_embeddings=True, num_hidden_layers=2)
    config = opened(tmp_path / "m.gguf").config
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "vocab_size": 300,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    assert {name: config[name] for name in wanted} == wanted


def test_tokenizer_comes_from_the_file(tmp_path):
    tiny_gguf(tmp_path / "m.gguf")
    checkpoint = opened(tmp_path / "m.gguf")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(checkpoint.made_files)
    assert b"local_files_only" not in checkpoint.made_files["tokenizer_config.json"]
    tokenizer = load_tokenizer(STORE, checkpoint)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.decode(tokenizer("that").input_ids) == "that"


def test_no_tensor_is_read_before_it_is_asked_for(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", num_hidden_layers=8)
    before = STORE.traffic.bytes_read
    checkpoint = opened(tmp_path / "m.gguf")
    assert STORE.traffic.bytes_read - before < 2 << 20
    assert checkpoint.shards["m.gguf"].size_bytes > 10 << 20


@pytest.mark.parametrize("address", ["", "m-00001-of-00003.gguf", "m-00002-of-00003.gguf"])
def test_parts_are_one_model_whichever_is_named(tmp_path, address):
    named = tiny_gguf(tmp_path / "m.gguf", split=8, num_hidden_layers=2)
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert len(parts) == 3
    found = read(tmp_path / address if address else tmp_path)
    assert list(opened(tmp_path).shards) == parts
    assert set(found) == set(named)
    assert not opened(tmp_path).config["tie_word_embeddings"]
    assert all(torch.equal(found[name], tensor) for name, tensor in named.items())


def test_a_missing_part_is_named(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", split=8, num_hidden_layers=2)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"lacks m-00002-of-00003\.gguf \(1 of 3 parts\)"):
        opened(tmp_path)


def test_a_folder_of_several_models_wants_a_name(tmp_path):
    tiny_gguf(tmp_path / "a.gguf")
    tiny_gguf(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="several models, a.gguf, b.gguf; name the file"):
        opened(tmp_path)
    assert list(opened(tmp_path / "b.gguf").shards) == ["b.gguf"]
    with pytest.raises(ObjectNotFoundError, match="c.gguf"):
        opened(tmp_path / "c.gguf")


def test_a_tensor_without_a_place_is_refused(tmp_path):
    extra = {"blk.0.unheard_of.weight": np.ones(8, dtype=np.float32)}
    tiny_gguf(tmp_path / "m.gguf", tensors=extra)
    with pytest.raises(CheckpointError, match="blk.0.unheard_of.weight, for which transformers has no place"):
        opened(tmp_path / "m.gguf")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def divisors_of(parameters):
    """What llama.cpp stores: default frequencies over those transformers runs with."""
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=parameters)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    default = 1.0 / 10000.0 ** (torch.arange(0, 128, 2).float() / 128)
    return (default / stretched).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stretched_rotary_frequencies_become_parameters(tmp_path, factor):
    parameters = {**LLAMA3, "factor": factor}
    tensors = {"rope_freqs.weight": divisors_of(parameters)}
    tiny_gguf(tmp_path / "m.gguf", tensors=tensors, num_attention_heads=2, head_dim=128)
    checkpoint = opened(tmp_path / "m.gguf")
    assert checkpoint.config["rope_parameters"] == parameters
    assert list(checkpoint.dropped) == ["rope_freqs.weight"]
    assert "rope_freqs.weight" in checkpoint.stored


def test_frequencies_stretched_in_another_way_are_refused(tmp_path):
    tensors = {"rope_freqs.weight": divisors_of({**LLAMA3, "high_freq_factor": 2.0})}
    tiny_gguf(tmp_path / "m.gguf", tensors=tensors, num_attention_heads=2, head_dim=128)
    with pytest.raises(CheckpointError, match="stretches the rotary frequencies"):
        opened(tmp_path / "m.gguf")


def test_an_architecture_that_transformers_does_not_read_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tensor("x", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'rwkv7'.*convert it to safetensors"):
        opened(tmp_path / "m.gguf")


def test_integers_are_refused(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", tensors={"output_norm.bias": np.ones(4, dtype=np.int32)})
    with pytest.raises(CheckpointError, match="I32, which the gguf package does not decode|no place"):
        opened(tmp_path / "m.gguf")


def test_inspection_tells_the_model(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", kind_of=lambda name: Kind.Q8_0, file_type=7)
    text = format_inspection(inspect_checkpoint(STORE, f"file://{tmp_path / 'm.gguf'}"))
    assert "LlamaForCausalLM (llama)" in text
    assert "gguf" in text
