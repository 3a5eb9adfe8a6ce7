"""Block by block equals transformers' own forward, for every family in the table; all others are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlib.errors import CheckpointError, UnsupportedModelError
from quantlib.model import families
from quantlib.model.skeleton import load_skeleton
from tests.support.block_by_block import logits_block_by_block
from tests.support.tiny_models import (
    FAMILY_SETTINGS,
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
    "phi3_longrope": (
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 12, "sliding_window": 6},
    ),
}


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))


def test_table_of_families_matches_tested_families() -> None:
    assert set(families.FAMILIES) == set(FAMILY_SETTINGS)


@pytest.mark.parametrize("case", _CASES)
def test_logits_block_by_block_equal_transformers(case: str, tmp_path: Path) -> None:
    family, settings = _CASES[case]
    folder = save_tiny_checkpoint(tmp_path, family, **settings)
    assert len(list(folder.glob("*.safetensors"))) > 1
    tensors = read_all_tensors(folder)
    skeleton = load_skeleton(read_config(folder), tensors)
    # Two lengths, the longer first: neither may leave traces in the other.
    for length in (21, 9):
        ids_BT = _ids(2, length)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = reference(ids_BT).logits
        logits_BTV = logits_block_by_block(skeleton, tensors, ids_BT)
        assert logits_BTV.dtype == torch.float32
        torch.testing.assert_close(logits_BTV, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_bfloat16_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    tensors = read_all_tensors(folder)
    skeleton = load_skeleton(read_config(folder), tensors)
    ids_BT = _ids(2, 11)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = reference(ids_BT).logits.float()
    # The same operations in the same dtype: no tolerance for a cast that transformers does not make.
    logits_BTV = logits_block_by_block(skeleton, tensors, ids_BT, torch.bfloat16)
    assert logits_BTV.dtype == torch.float32
    assert torch.equal(logits_BTV, expected)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("gptj", [{"q_proj", "k_proj", "v_proj", "fc_in"}, {"out_proj"}, {"fc_out"}]),
        ("cohere", [{"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}]),
    ],
)
def test_family_added_to_the_table_works_without_further_code(
    family: str, groups: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have parallel residuals; gptj's blocks return tuples, own rotary buffers and take positional masks.
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    config = {
        **tiny_config("llama"),
        "model_type": family,
        **({"rotary_dim": 4, "num_key_value_heads": 4} if family == "gptj" else {}),
    }
    model = tiny_model(config)
    skeleton = load_skeleton(config, model.state_dict())
    names = [{name.rsplit(".", 1)[1] for name in group} for group in skeleton.block_spec(1).input_groups]
    assert names == groups
    ids_BT = _ids(2, 13)
    with torch.no_grad():
        expected = model(ids_BT).logits
    logits_BTV = logits_block_by_block(skeleton, model.state_dict(), ids_BT)
    torch.testing.assert_close(logits_BTV, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mamba", "gemma3", "t5", "no_such_model", None])
def test_unknown_family_is_refused_by_name(model_type: str | None) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load_skeleton({**tiny_config("llama"), "model_type": model_type}, [])
    assert repr(model_type) in str(caught.value)
    assert all(family in str(caught.value) for family in FAMILY_SETTINGS)


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
