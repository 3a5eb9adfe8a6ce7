"""Which side of a linear engines split: transformers' plans, and names where these say nothing."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantlib.job.parallel_splits import HEADS, IN, OUT, split_of, split_styles

# Of what stands for heads only heads tell how it is split.
SPLIT_BY_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


def test_names_agree_with_every_plan_of_transformers():
    compared = set()
    for config in CONFIG_MAPPING.values():
        for path, style in split_styles(config.base_model_tp_plan or {}).items():
            by_name = split_of(path, {})
            if style in ("colwise", "rowwise") and "experts." not in path and by_name in (IN, OUT):
                compared.add(path)
                assert by_name == {"colwise": OUT, "rowwise": IN}[style], (config, path)
    assert len(compared) > 20


@pytest.mark.parametrize(
    ("path", "styles", "expected"),
    [
        ("mlp.down_proj", {}, IN),
        ("mlp.gate_proj", {}, OUT),
        ("attention.dense", {}, IN),
        ("attn.c_proj", {}, IN),
        # A plan wins over a name.
        ("mlp.dense", {"mlp.dense": "colwise"}, OUT),
        ("self_attn.2.q_b_proj", {"self_attn.*.q_b_proj": "colwise"}, OUT),
        # Styles of transformers' own leave it to the name.
        ("mlp.down_proj", {"mlp.down_proj": "rowwise_split_input"}, IN),
        ("linear_attn.out_proj", {"linear_attn.out_proj": "colwise_gather_output"}, IN),
        # Heads are split, or repeated.
        *[(f"self_attn.{name}", {f"self_attn.{name}": "colwise"}, HEADS) for name in SPLIT_BY_HEADS],
        # Every device has the first factors of a latent attention.
        ("self_attn.kv_a_proj_with_mqa", {"self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj"}, None),
        ("self_attn.q_a_proj", {}, None),
        ("ple.projection", {}, None),
    ],
)
def test_a_linear_is_split_as_its_plan_or_else_its_name_says(path, styles, expected):
    assert split_of(path, styles) == expected


def test_styles_of_fused_experts_say_nothing_of_one_expert():
    """Llama 4 stores them transposed: what is colwise there are the in features of an expert's linear."""
    styles = split_styles(CONFIG_MAPPING["llama4_text"].base_model_tp_plan)
    assert styles["feed_forward.experts.down_proj"] == "colwise"
    assert split_of("feed_forward.experts.3.down_proj", styles, is_expert=True) == IN
    assert split_of("feed_forward.experts.3.up_proj", styles, is_expert=True) == OUT
