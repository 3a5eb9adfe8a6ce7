"""What a skeleton says: blocks, linears, input groups, and where every stored tensor belongs."""

import pickle
from typing import Any

import pytest
import torch

from quantlib.errors import CheckpointError
from quantlib.model.skeleton import LinearSpec, Skeleton, _ends, load_skeleton
from quantlib.model.trace import ModelTrace
from quantlib.model.unused import IGNORED, LATER_LAYER, RECOMPUTED, UNKNOWN
from quantlib.strided_view import StoredPart
from tests.support.block_by_block import logits_block_by_block
from tests.support.tiny_models import tiny_config, tiny_model

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")

_SEPARATE = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
_FUSED = [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)]


def _stored(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What save_pretrained would store: a tied head is left out."""
    state = tiny_model(config).state_dict()
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    return state


def _load(family: str, **settings: Any) -> Skeleton:
    config = tiny_config(family, **settings)
    return load_skeleton(config, _stored(config))


@pytest.mark.parametrize("family", _FAMILIES)
def test_linears_that_read_one_tensor_are_one_input_group(family: str) -> None:
    skeleton = _load(family)
    expected = _FUSED if family == "phi3" else _SEPARATE
    assert skeleton.num_blocks == 4
    for index in range(4):
        spec = skeleton.block_spec(index)
        prefix = f"model.layers.{index}"
        assert (spec.index, spec.prefix) == (index, prefix)
        assert spec.input_groups == tuple(tuple(f"{prefix}.{name}" for name in group) for group in expected)
        assert [linear.name for linear in spec.linears] == [
            name for group in spec.input_groups for name in group
        ]


def test_linears_have_shapes_and_biases_of_the_stored_weights() -> None:
    config = tiny_config("qwen2")
    stored = _stored(config)
    linears = load_skeleton(config, stored).block_spec(2).linears
    assert linears[1] == LinearSpec(
        name="model.layers.2.self_attn.k_proj",
        path="self_attn.k_proj",
        rows=16,
        columns=32,
        experts=None,
        expert=None,
        weight_tensors=("model.layers.2.self_attn.k_proj.weight",),
        weight_view=None,
        bias=StoredPart(tensor="model.layers.2.self_attn.k_proj.bias"),
    )
    for linear in linears:
        assert stored[f"{linear.name}.weight"].shape == (linear.rows, linear.columns)
        assert (linear.bias is not None) == (f"{linear.name}.bias" in stored)


@pytest.mark.parametrize("family", _FAMILIES)
def test_every_stored_tensor_belongs_to_exactly_one_part(family: str) -> None:
    config = tiny_config(family, tie_word_embeddings=False)
    stored = _stored(config)
    skeleton = load_skeleton(config, stored)
    parts = [*skeleton.prelude_tensors, *skeleton.tail_tensors]
    for index in range(skeleton.num_blocks):
        parts += skeleton.block_spec(index).tensors
    assert sorted(parts) == sorted(stored)
    assert skeleton.prelude_tensors == ("model.embed_tokens.weight",)
    assert skeleton.tail_tensors == ("model.norm.weight", "lm_head.weight")
    assert skeleton.unused_tensors == ()


def test_tied_embedding_is_in_prelude_and_tail() -> None:
    skeleton = _load("gemma2")
    assert skeleton.prelude_tensors == ("model.embed_tokens.weight",)
    assert skeleton.tail_tensors == ("model.norm.weight", "model.embed_tokens.weight")


def test_tensors_of_modules_that_never_run_belong_to_the_prelude() -> None:
    tensors = {path: [f"{path}.weight"] for path in ("idle", "head", "in")}
    trace = ModelTrace(blocks=[], prelude=["in"], tail=["head"])
    assert _ends(tensors, trace) == (("in.weight", "idle.weight"), ("head.weight",))


def test_tied_head_stored_alone_serves_as_embedding() -> None:
    config = tiny_config("qwen2")
    stored = _stored(config)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    skeleton = load_skeleton(config, stored)
    assert skeleton.prelude_tensors == ("lm_head.weight",)
    assert skeleton.tail_tensors == ("model.norm.weight", "lm_head.weight")


def test_head_stored_although_config_ties_it_is_used_under_its_own_name() -> None:
    config = tiny_config("qwen2")
    stored = tiny_model({**config, "tie_word_embeddings": False}).state_dict()
    skeleton = load_skeleton(config, stored)
    assert skeleton.tail_tensors == ("model.norm.weight", "lm_head.weight")
    untied = load_skeleton({**config, "tie_word_embeddings": False}, stored)
    ids_BT = torch.arange(12).reshape(1, 12)
    expected = logits_block_by_block(untied, stored, ids_BT)
    assert torch.equal(logits_block_by_block(skeleton, stored, ids_BT), expected)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.bias", "model.norm.weight"],
)
def test_missing_tensor_is_named(name: str) -> None:
    config = tiny_config("qwen2")
    stored = _stored(config)
    del stored[name]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load_skeleton(config, stored)
    assert caught.value.facts == {"tensor": name}


def test_missing_head_of_untied_model_is_named() -> None:
    config = tiny_config("llama")
    stored = _stored(config)
    del stored["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_skeleton(config, stored)


def test_stored_tensors_without_a_use_are_listed() -> None:
    config = tiny_config("llama")
    extra = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.4.mlp.up_proj.weight",
        "score.weight",
    ]
    skeleton = load_skeleton(config, [*_stored(config), *extra])
    assert skeleton.unused_tensors == tuple(sorted(extra))
    assert [skeleton.unused_reasons[name] for name in extra] == [RECOMPUTED, LATER_LAYER, UNKNOWN]


def test_later_layers_are_known_by_number_and_by_what_transformers_ignores() -> None:
    config = tiny_config("qwen3_next")
    extra = ["model.layers.4.norm.weight", "mtp.layers.0.norm.weight", "model.layers.extra.9.weight"]
    skeleton = load_skeleton(config, [*_stored(config), *extra])
    assert [skeleton.unused_reasons[name] for name in extra] == [LATER_LAYER, IGNORED, UNKNOWN]


def test_skeleton_survives_pickling_as_config_and_names() -> None:
    skeleton = _load("gemma3_text")
    pickled = pickle.dumps(skeleton)
    again = pickle.loads(pickled)
    assert len(pickled) < 10_000
    assert again.tail_tensors == skeleton.tail_tensors
    assert [again.block_spec(i) for i in range(4)] == [skeleton.block_spec(i) for i in range(4)]


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("gptj", [{"q_proj", "k_proj", "v_proj", "fc_in"}, {"out_proj"}, {"fc_out"}]),
        ("cohere", [{"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}]),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
        ("falcon", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
    ],
)
def test_input_groups_follow_the_wiring_of_the_family(family: str, groups: list[set[str]]) -> None:
    found = _load(family).block_spec(1).input_groups
    names = [{name.rsplit(".", 1)[1] for name in group} for group in found]
    assert sorted(map(sorted, names)) == sorted(map(sorted, groups))


def test_transposed_weight_is_a_linear_read_transposed() -> None:
    config = tiny_config("gpt2")
    stored = _stored(config)
    skeleton = load_skeleton(config, stored)
    spec = skeleton.block_spec(2)
    linear = next(li for li in spec.linears if li.name == "transformer.h.2.mlp.c_fc")
    assert (linear.rows, linear.columns, linear.is_stored_as_is) == (128, 32, False)
    block: Any = skeleton.build_block(2, stored, dtype=torch.float32, device="cpu")
    assert torch.equal(block.mlp.c_fc.weight, stored["transformer.h.2.mlp.c_fc.weight"].T)


def test_405b_shaped_model_needs_no_memory_for_weights() -> None:
    config = tiny_config(
        "llama",
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=2,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    block = [name for name in _stored(tiny_config("llama")) if ".layers.0." in name or ".layers.1." in name]
    skeleton = load_skeleton(config, names + block)
    assert sum(linear.rows * linear.columns for linear in skeleton.block_spec(0).linears) > 3e9
    assert all(parameter.is_meta for parameter in skeleton._model.parameters())
