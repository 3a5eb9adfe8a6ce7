"""What must be quantized alike follows from the structure; rules that part it, or do nothing, are refused."""

from pathlib import Path

import pytest

from quantlib.errors import RecipeError
from quantlib.job.fused_sets import fused_sets
from quantlib.job.planner import build_plan
from quantlib.model.skeleton import load_skeleton
from quantlib.recipe import read_recipe
from quantlib.schemes import WeightScheme
from tests.support.tiny_jobs import tiny_options, tiny_source
from tests.support.tiny_models import tiny_config, tiny_model

RECIPES = Path(__file__).resolve().parents[2] / "infra" / "recipes"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("rules")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    tiny_source(root / "source", "qwen3_moe", moe_intermediate_size=32, num_experts=4)
    return root


def planned(root, *rules, **options):
    options = {"method": "rtn", "calibration": None, "evaluation": None, **options}
    return build_plan(tiny_options(root, rules=rules, **options), 1)[0]


@pytest.mark.parametrize(
    ("family", "block", "expected"),
    [
        ("llama", 1, [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]),
        # Attention and MLP read the same tensor and are two modules.
        ("cohere", 1, [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]),
        ("gptj", 1, [{"q_proj", "k_proj", "v_proj"}]),
        ("phi3", 1, []),
        ("gpt_neox", 1, []),
    ],
)
def test_linears_that_read_the_same_tensor_in_a_module_are_a_set(family, block, expected):
    config = tiny_config(family)
    spec = load_skeleton(config, list(tiny_model(config).state_dict())).block_spec(block)
    assert [{name.rpartition(".")[2] for name in names} for _, names in fused_sets(spec)] == expected


def test_experts_of_a_block_are_one_set_without_the_shared_ones():
    config = tiny_config("deepseek_v3")
    spec = load_skeleton(config, list(tiny_model(config).state_dict())).block_spec(1)
    *pairs, routed = (names for _, names in fused_sets(spec))
    assert set(routed) == {linear.name for linear in spec.linears if linear.expert is not None}
    assert len(routed) == 4 * 3
    assert [{name.rpartition(".")[2] for name in names} for names in pairs] == [
        {"q_a_proj", "kv_a_proj_with_mqa"},
        {"gate_proj", "up_proj"},
    ]
    assert all("shared_experts" in name for name in pairs[1])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"match": "*.k_proj", "scheme": "W8A16"},
            r"layers\.0\.self_attn\.q_proj is to be 4 bits, symmetric, groups of 32 and .*k_proj 8 bits,"
            r" symmetric, groups of 32; they are linears of model\.layers\.0\.self_attn that read the same",
        ),
        (
            {"match": "*.1.*.v_proj", "keep": True},
            r"layers\.1\.self_attn\.v_proj kept as it is; .* same rule",
        ),
        ({"match": "*.up_proj", "group_size": -1}, r"up_proj 4 bits, symmetric, one scale a row"),
        ({"match": "*.q_proj", "scheme": "W4A16_ASYM"}, r"q_proj is to be 4 bits, asymmetric"),
    ],
)
def test_rules_that_part_a_set_are_refused_with_both_linears_and_schemes(root, rule, said):
    with pytest.raises(RecipeError, match=said):
        planned(root, rule)


def test_rules_that_part_the_experts_of_a_block_are_refused(experts):
    for match in ("*.experts.3.*", "*.down_proj"):
        with pytest.raises(RecipeError, match="are experts of block 1, which engines fuse"):
            planned(experts, {"match": match, "scheme": "W8A16"})
    plan = planned(experts, {"match": "*.experts.*", "scheme": "W8A16"})
    bits = {linear.scheme.bits for linear in plan.blocks[1].linears if "experts" in linear.name}
    assert bits == {8}


def test_sets_of_different_blocks_and_modules_may_differ_and_methods_too(root):
    plan = planned(
        root,
        {"match": "*.0.self_attn.[qkv]_proj", "scheme": "W8A16", "group_size": 16},
        {"match": "*.0.self_attn.*", "keep": True},
        {"match": "*.down_proj", "group_size": 16},
        {"match": "*.up_proj", "method": "rtn"},
    )
    found = {
        linear.name.removeprefix("model.layers."): linear.scheme for b in plan.blocks for linear in b.linears
    }

    def scheme(bits, group_size):
        return WeightScheme(bits=bits, is_symmetric=True, group_size=group_size)

    assert found["0.self_attn.q_proj"] == found["0.self_attn.v_proj"] == scheme(8, 16)
    assert found["0.self_attn.o_proj"] is None
    assert found["1.self_attn.o_proj"] == found["0.mlp.up_proj"] == scheme(4, 32)
    assert found["1.mlp.down_proj"] == scheme(4, 16)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"match": "*.w_down", "scheme": "W8A16"},
            r"rule 2 matches nothing in this model: '\*\.w_down';.*q_proj",
        ),
        ({"match": "*.w_down", "keep": True}, "rule 2 matches nothing"),
        ({"match": "lm_head", "scheme": "W8A16"}, "quantize lm_head, which is a linear outside the blocks"),
        ({"match": "re:.*head"}, "quantize lm_head, which is a linear outside the blocks"),
        ({"match": "*norm", "scheme": "W8A16"}, "quantize model.*norm, which is no linear of a block"),
    ],
)
def test_rules_that_could_do_nothing_are_refused_with_the_reason(root, rule, said):
    with pytest.raises(RecipeError, match=said):
        planned(root, {"match": "*.down_proj", "scheme": "W8A16"}, rule)


def test_rules_may_keep_what_is_kept_and_stand_behind_others_and_wildcards_leave_the_head(root):
    plan = planned(
        root,
        {"match": "lm_head", "keep": True},
        {"match": "*norm", "keep": True},
        {"match": "*", "scheme": "W8A16"},
        {"match": "*.down_proj", "scheme": "W4A16"},
    )
    assert {linear.scheme.bits for block in plan.blocks for linear in block.linears} == {8}
    assert "lm_head" in plan.kept_linears


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_rules_of_shipped_recipes_suit_a_plain_transformer(root, path):
    planned(root, *read_recipe(path).get("rules", ()))
