"""Live blocks and ends: real buffers, shared memory, requested dtype, and clear refusals."""

from typing import Any

import pytest
import torch
from torch import nn

from quantlib.errors import CheckpointError
from quantlib.model.block_inputs import StandIn
from quantlib.model.skeleton import BlockInputs, Skeleton, load_skeleton, run_block
from tests.support.tiny_models import tiny_config, tiny_model

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def _parts(family: str, **settings: Any) -> tuple[Skeleton, dict[str, torch.Tensor]]:
    config = tiny_config(family, **settings)
    tensors = {name: tensor.detach() for name, tensor in tiny_model(config).state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    return load_skeleton(config, tensors), tensors


def _ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(5))


def test_block_inputs_carry_real_rotary_values() -> None:
    skeleton, tensors = _parts("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    _, inputs = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu").embed(_ids())
    cos, sin = inputs[0].kwargs["position_embeddings"]
    # Closed form of rotary embeddings: position times theta ** (-2 i / head size), head size 8.
    frequencies = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.arange(11, dtype=torch.float64)[:, None] * frequencies
    torch.testing.assert_close(cos[0].double(), angles.cos().repeat(1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0].double(), angles.sin().repeat(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", _FAMILIES)
def test_block_inputs_are_shared_and_free_of_caches_and_gradients(family: str) -> None:
    skeleton, tensors = _parts(family)
    _, inputs = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu").embed(_ids())
    assert len(inputs) == skeleton.num_blocks
    # gemma alternates two kinds of attention: blocks 0 and 2 are of one kind everywhere.
    assert inputs[0].kwargs["position_embeddings"][0] is inputs[2].kwargs["position_embeddings"][0]
    assert inputs[0].kwargs["attention_mask"] is inputs[2].kwargs["attention_mask"]
    for block_inputs in inputs:
        assert block_inputs.kwargs.get("past_key_values") is None
        assert not block_inputs.kwargs.get("use_cache")
        assert "hidden_states" not in block_inputs.kwargs


def test_full_causal_attention_passes_no_mask() -> None:
    skeleton, tensors = _parts("qwen3")
    _, inputs = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu").embed(_ids())
    assert inputs[0].kwargs["attention_mask"] is None


def test_sliding_and_full_blocks_keep_their_attention() -> None:
    skeleton, tensors = _parts("gemma3_text")
    windows = [
        skeleton.build_block(i, tensors, dtype=torch.float32, device="cpu").self_attn.sliding_window
        for i in range(4)
    ]
    assert windows == [6, None, 6, None]


def test_block_shares_memory_when_nothing_is_cast() -> None:
    skeleton, tensors = _parts("qwen2")
    block = skeleton.build_block(1, tensors, dtype=torch.float32, device="cpu")
    for name, parameter in block.named_parameters():
        assert parameter.data_ptr() == tensors[f"model.layers.1.{name}"].data_ptr()
        assert not parameter.requires_grad
    assert not any(module.training for module in block.modules())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_block_runs_on_read_only_memory() -> None:
    skeleton, tensors = _parts("llama")
    outer = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu")
    hidden_BTD, inputs = outer.embed(_ids())
    frozen = {
        name: torch.frombuffer(tensors[name].numpy().tobytes(), dtype=torch.float32).view(tensors[name].shape)
        for name in skeleton.block_spec(0).tensors
    }
    block = skeleton.build_block(0, tensors, dtype=torch.float32, device="cpu")
    expected = run_block(block, hidden_BTD, inputs[0])
    block = skeleton.build_block(0, frozen, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        assert torch.equal(run_block(block, hidden_BTD, inputs[0]), expected)


def test_block_is_cast_to_requested_dtype_and_skeleton_stays_meta() -> None:
    skeleton, tensors = _parts("llama")
    block = skeleton.build_block(0, tensors, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    again = skeleton.build_block(0, tensors, dtype=torch.float32, device="cpu")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert all(parameter.is_meta for parameter in skeleton._model.parameters())


def test_ends_are_built_apart_and_say_which_tensor_they_lack() -> None:
    skeleton, tensors = _parts("llama")
    prelude = {name: tensors[name] for name in skeleton.prelude_tensors}
    tail = {name: tensors[name] for name in skeleton.tail_tensors}
    front = skeleton.build_outer(prelude, dtype=torch.float32, device="cpu")
    back = skeleton.build_outer(tail, dtype=torch.float32, device="cpu")
    hidden_BTD, _ = front.embed(_ids())
    assert back.logits(hidden_BTD).shape == (2, 11, 96)
    with pytest.raises(CheckpointError, match=r"logits needs tensor model\.norm\.weight.*tail_tensors"):
        front.logits(hidden_BTD)
    with pytest.raises(CheckpointError, match=r"embed needs tensor model\.embed_tokens\.weight.*prelude"):
        back.embed(_ids())


def test_tied_embedding_is_held_once_for_both_ends() -> None:
    skeleton, tensors = _parts("gemma2")
    outer = skeleton.build_outer(tensors, dtype=torch.bfloat16, device="cpu")
    assert outer._model.lm_head.weight is outer._model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_a_slice_equal_the_slice_of_logits(family: str) -> None:
    skeleton, tensors = _parts(family)
    outer = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu")
    hidden_BTD = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
    whole = outer.logits(hidden_BTD)
    part = outer.logits(hidden_BTD[1:, 3:7])
    torch.testing.assert_close(part, whole[1:, 3:7], rtol=0, atol=1e-5)


def test_what_was_embedded_before_does_not_change_block_inputs() -> None:
    # Dynamic rotary scaling remembers the longest sequence; 20 is beyond the 12 trained positions, below 40.
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    skeleton, tensors = _parts("llama", rope_parameters=rope, max_position_embeddings=12)
    outer = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu")
    _, fresh = outer.embed(_ids(1, 20))
    outer.embed(_ids(1, 40))
    _, later = outer.embed(_ids(1, 20))
    assert torch.equal(fresh[0].kwargs["position_embeddings"][0], later[0].kwargs["position_embeddings"][0])


def test_missing_block_tensor_is_named() -> None:
    skeleton, tensors = _parts("llama")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        skeleton.build_block(2, tensors, dtype=torch.float32, device="cpu")


def test_tensor_of_wrong_shape_is_named_with_both_shapes() -> None:
    skeleton, tensors = _parts("llama")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(32, 48)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \[32, 48\].*wants \[48, 32\]"):
        skeleton.build_block(0, tensors, dtype=torch.float32, device="cpu")


def test_run_block_takes_the_hidden_state_out_of_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, hidden: torch.Tensor, bias: float, *, scale: float) -> tuple[torch.Tensor, None]:
            return hidden * scale + bias, None

    inputs = BlockInputs(args=(1.0,), kwargs={"scale": 3.0})
    assert torch.equal(run_block(Pair(), torch.ones(1, 2, 2), inputs), torch.full((1, 2, 2), 4.0))


def test_stand_in_has_the_attributes_of_its_block_but_not_its_weights() -> None:
    block = nn.Linear(3, 2)
    block.attention_type = "sliding_attention"
    stand_in = StandIn(block, num_outputs=3)
    assert stand_in.attention_type == "sliding_attention"
    assert list(stand_in.parameters()) == []
    hidden = torch.zeros(1, 2, 3)
    output = stand_in(hidden_states=hidden)
    assert output[0] is hidden
    assert output[1:] == (None, None)
    with pytest.raises(AttributeError):
        _ = stand_in.no_such_attribute
