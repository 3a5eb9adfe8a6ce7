"""Block by block equals transformers' own forward for every family in the table; others are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.errors import CheckpointError, UnsupportedModelError
from quantlib.model.skeleton import Skeleton, load_skeleton
from quantlib.model.unused import OTHER_TOWER
from tests.support.block_by_block import logits_block_by_block
from tests.support.family_settings import FAMILY_SETTINGS, MULTIMODAL, REFUSED
from tests.support.tiny_models import (
    auto_class,
    read_all_tensors,
    read_config,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 12,
}
# Case -> (family, settings): every family as FAMILY_SETTINGS has it, and what else their configs hold.
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILY_SETTINGS},
    "llama_tied_biased_llama3_rope": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "llama_dynamic_rope": ("llama", {"rope_parameters": _DYNAMIC_ROPE, "max_position_embeddings": 12}),
    "mistral_without_window": ("mistral", {"sliding_window": None}),
    "qwen2_untied_yarn": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": _YARN_ROPE}),
    "qwen2_sliding": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        },
    ),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2_untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3_text_without_softcap": ("gemma3_text", {"final_logit_softcapping": None}),
    "bloom_untied": ("bloom", {"tie_word_embeddings": False}),
    "falcon_old_layout": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "opt_post_norm_projected": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False}),
    # Experts 10 and 11 come after 9, not after 1.
    "qwen3_moe_twelve_experts": ("qwen3_moe", {"num_experts": 12}),
    "phi3_longrope": (
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 12, "sliding_window": 6},
    ),
}


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))


def _assert_accounted_for(skeleton: Skeleton, stored: dict[str, torch.Tensor]) -> None:
    parts = [*skeleton.prelude_tensors, *skeleton.tail_tensors, *skeleton.unused_tensors]
    for index in range(skeleton.num_blocks):
        spec = skeleton.block_spec(index)
        parts += spec.tensors
        assert spec.linears
        assert {name for group in spec.input_groups for name in group} == {li.name for li in spec.linears}
        for linear in spec.linears:
            assert set(linear.weight_tensors) <= set(spec.tensors)
            assert linear.name.startswith(f"{spec.prefix}.")
            # No stored matrix that is a linear's weight goes by another name.
            if len(linear.weight_tensors) == 1 and stored[linear.weight_tensors[0]].ndim == 2:
                assert linear.expert is not None or linear.weight_tensors == (f"{linear.name}.weight",)
    # A tied embedding is in both ends under its one name.
    ends = set(skeleton.prelude_tensors) & set(skeleton.tail_tensors)
    assert sorted([*parts]) == sorted([*stored, *ends])


@pytest.mark.parametrize("case", _CASES)
def test_logits_block_by_block_equal_transformers(case: str, tmp_path: Path) -> None:
    family, settings = _CASES[case]
    folder = save_tiny_checkpoint(tmp_path, family, **settings)
    assert len(list(folder.glob("*.safetensors"))) > 1
    tensors = read_all_tensors(folder)
    config = read_config(folder)
    skeleton = load_skeleton(config, tensors)
    _assert_accounted_for(skeleton, tensors)
    reference = auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    # Two lengths, the longer first: neither may leave traces in the other.
    for length in (21, 9):
        ids_BT = _ids(2, length)
        with torch.no_grad():
            expected = reference(input_ids=ids_BT, use_cache=False).logits
        logits_BTV = logits_block_by_block(skeleton, tensors, ids_BT)
        assert logits_BTV.dtype == torch.float32
        torch.testing.assert_close(logits_BTV, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_names_without_the_prefix_of_the_model_are_found(family: str, tmp_path: Path) -> None:
    # As openai-community/gpt2, bigscience/bloom-560m and facebook/opt-125m store them.
    folder = save_tiny_checkpoint(tmp_path, family)
    prefix = "model." if family == "opt" else "transformer."
    stored = read_all_tensors(folder)
    renamed = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    skeleton = load_skeleton(read_config(folder), renamed)
    _assert_accounted_for(skeleton, renamed)
    ids_BT = _ids(2, 9)
    expected = logits_block_by_block(load_skeleton(read_config(folder), stored), stored, ids_BT)
    assert torch.equal(logits_block_by_block(skeleton, renamed, ids_BT), expected)
    assert not any(linear.name.startswith(prefix) for linear in skeleton.block_spec(1).linears)


def test_tensor_stored_in_either_orientation_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    # Qwen3-VL-MoE is published with [E, in, out] and saved by transformers as [E, out, in].
    folder = save_tiny_checkpoint(tmp_path, "qwen3_vl_moe")
    stored = read_all_tensors(folder)
    turned = {
        name: t.transpose(1, 2) if t.ndim == 3 and "experts" in name else t for name, t in stored.items()
    }
    skeleton, ids_BT = load_skeleton(read_config(folder), stored), _ids(2, 9)
    expected = logits_block_by_block(skeleton, stored, ids_BT)
    assert torch.equal(logits_block_by_block(skeleton, turned, ids_BT), expected)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_other_towers_of_a_multimodal_model_are_unused(family: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, family)
    tensors = read_all_tensors(folder)
    skeleton = load_skeleton(read_config(folder), tensors)
    others = {name for name in tensors if "vision" in name or "visual" in name or "projector" in name}
    assert others and skeleton.unused_reasons == dict.fromkeys(sorted(others), OTHER_TOWER)


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_cannot_run_block_by_block_is_refused_with_the_reason(family: str) -> None:
    settings, reason = REFUSED[family]
    config = {**tiny_config("llama"), "model_type": family, **settings}
    with pytest.raises(UnsupportedModelError, match=reason):
        load_skeleton(config, tiny_model(config).state_dict())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_bfloat16_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    tensors = read_all_tensors(folder)
    skeleton = load_skeleton(read_config(folder), tensors)
    ids_BT = _ids(2, 11)
    reference = auto_class({}).from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = reference(ids_BT).logits.float()
    # The same operations in the same dtype: no tolerance for a cast that transformers does not make.
    logits_BTV = logits_block_by_block(skeleton, tensors, ids_BT, torch.bfloat16)
    assert logits_BTV.dtype == torch.float32
    assert torch.equal(logits_BTV, expected)


@pytest.mark.parametrize("model_type", ["t5", "bert", "no_such_model", None])
def test_model_that_is_no_causal_language_model_is_refused_by_name(model_type: str | None) -> None:
    with pytest.raises(UnsupportedModelError, match="wanted a causal language model"):
        load_skeleton({"model_type": model_type}, [])


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("llama", {"is_causal": False}, "is_causal"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_config_of_another_kind_of_model_is_refused(
    family: str, settings: dict[str, Any], named: str
) -> None:
    config = tiny_config(family)
    names = tiny_model(config).state_dict().keys()
    with pytest.raises(UnsupportedModelError, match=named):
        load_skeleton({**config, **settings}, names)


@pytest.mark.parametrize("settings", [{"hidden_size": "wide"}, {"num_attention_heads": 5}])
def test_invalid_config_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is not a valid llama configuration"):
        load_skeleton({**tiny_config("llama"), **settings}, [])


def test_config_that_names_remote_code_runs_none_of_it() -> None:
    config = tiny_config("phi3")
    names = tiny_model(config).state_dict().keys()
    remote = {
        "auto_map": {"AutoModelForCausalLM": "modeling_elsewhere.Other", "AutoConfig": "elsewhere.Other"}
    }
    skeleton = load_skeleton({**config, **remote}, names)
    assert skeleton.num_blocks == 4
