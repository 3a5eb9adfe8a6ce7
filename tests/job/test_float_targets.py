"""What engines reject of small floats and rounded inputs, each shape decided by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import RecipeError
from quantlib.job.parallel_splits import HEADS, IN, OUT
from quantlib.job.serving import Serving
from quantlib.job.targets import refuse_unserved
from quantlib.schemes import CODEBOOK_NAMES, FLOAT_NAMES, ROUNDED_INPUTS_NAMES, WHOLE_TENSOR
from quantlib.simulation.config_shapes import shipped_config
from tests.support.servings import llama, refusal, served

_ALL = (*FLOAT_NAMES, *ROUNDED_INPUTS_NAMES)
_KEEPING = "a rule that keeps these linears as they are"


def of(*linears, devices=1, layout="compressed-tensors", **values):
    return Serving(linears=linears, format=layout, tensor_parallel=devices, **values)


def ways_of(target, serving):
    return (
        refusal(target, serving)
        .message.splitlines()[-1]
        .removeprefix("What would do instead: ")
        .split("; or ")
    )


@pytest.mark.parametrize("scheme", _ALL)
def test_linears_of_every_scheme_are_taken_but_for_one(scheme):
    model = llama(shipped_config("llama-3.1-70b"), None, 8, scheme=scheme)
    if scheme == "FP8A16_BLOCK":
        said = refusal("vllm", model)
        assert "it takes FP8 by blocks with rounded inputs" in said.message
        assert "compressed_tensors_w8a16_fp8.py" in said.message
        assert "scheme FP8A16" in ways_of("vllm", model) and "scheme FP8_BLOCK" in ways_of("vllm", model)
        # As many bits, and floats.
        assert not any("FP4" in way or "W8" in way for way in ways_of("vllm", model))
    else:
        refuse_unserved("vllm", model)
    refuse_unserved("transformers", llama(shipped_config("llama-3.1-70b"), None, 1, scheme=scheme))


@pytest.mark.parametrize(
    ("scheme", "vllm", "transformers"),
    [
        ("FP8A16", False, True),
        ("FP8A16_TENSOR", False, True),
        ("FP8A16_BLOCK", False, False),
        ("MXFP4A16", True, True),
        ("MXFP8A16", True, False),
        ("NVFP4A16", True, False),
        ("W8A8", True, False),
        ("FP8_DYNAMIC", True, False),
        ("FP8_DYNAMIC_TENSOR", False, False),
        ("FP8_BLOCK", True, False),
        ("MXFP4", True, False),
        ("MXFP8", True, False),
    ],
)
def test_routed_experts(scheme, vllm, transformers):
    experts = [
        served(f"experts.0.{name}_proj", *shape, scheme=scheme, group_size=None, is_expert=True)
        for name, shape in (("gate", (512, 1024, OUT)), ("down", (1024, 512, IN)))
    ]
    for target, is_taken in (("vllm", vllm), ("transformers", transformers)):
        if is_taken:
            refuse_unserved(target, of(*experts))
        else:
            assert "it takes routed experts" in refusal(target, of(*experts)).message


@pytest.mark.parametrize(
    ("scheme", "devices", "said"),
    [
        ("FP8_BLOCK", 8, None),  # 28672 / 8 = 28 * 128, heads of 128
        ("FP8_BLOCK", 32, None),  # 28672 / 32 = 7 * 128, 8 heads of keys, each on 4 devices
        # 28672 / 64 = 448 = 3.5 * 128
        ("FP8_BLOCK", 64, "448 out features on a device in blocks of 128 (gate_proj and 1 more)"),
        ("MXFP4", 64, None),  # 448 = 14 * 32
        ("NVFP4A16", 64, None),
        ("FP8A16", 64, None),
        ("FP8_DYNAMIC_TENSOR", 64, None),
    ],
)
def test_vllm_and_shares_of_llama_70b(scheme, devices, said):
    model = llama(shipped_config("llama-3.1-70b"), None, devices, scheme=scheme)
    if said is None:
        refuse_unserved("vllm", model)
    else:
        assert said in refusal("vllm", model).message
        assert "448 each, in groups of 128" in refusal("vllm", model).message


@pytest.mark.parametrize(
    ("name", "rows", "columns", "split", "devices", "said"),
    [
        # One device: a ragged block may be the last of a matrix.
        ("self_attn.q_proj", 320, 256, HEADS, 1, "320 out features"),
        ("self_attn.k_proj", 192, 256, HEADS, 1, "192 out features"),
        ("self_attn.v_proj", 192, 256, HEADS, 1, None),
        ("self_attn.qkv_proj", 768, 256, HEADS, 1, None),  # 4 + 2 * 1 heads of 128
        ("self_attn.qkv_proj", 480, 256, HEADS, 1, "320 out features"),  # heads of 80
        ("mlp.gate_up_proj", 384, 256, OUT, 1, "192 out features"),
        ("mlp.gate_up_proj", 512, 256, OUT, 1, None),
        ("mlp.gate_up_proj", 512, 256, OUT, 4, "64 out features"),
        ("mlp.gate_proj", 192, 256, OUT, 1, "192 out features"),
        ("mlp.fc1", 192, 256, OUT, 1, None),
        ("mlp.fc1", 384, 256, OUT, 2, "192 out features"),
        ("mlp.down_proj", 192, 256, IN, 2, None),
        ("mlp.down_proj", 192, 384, IN, 2, "192 each, in groups of 128"),
        ("self_attn.q_a_proj", 192, 256, None, 2, "192 out features"),
        ("self_attn.kv_a_proj_with_mqa", 576, 256, None, 2, None),
        # The one head of keys is on both devices.
        ("self_attn.k_proj", 128, 256, HEADS, 2, None),
        ("self_attn.q_proj", 256, 256, HEADS, 2, None),
        ("self_attn.q_proj", 256, 256, HEADS, 4, "64 out features"),
    ],
)
def test_vllm_wants_whole_blocks_where_rows_are_cut_or_followed(name, rows, columns, split, devices, said):
    linear = served(name, rows, columns, split, scheme="FP8_BLOCK", group_size=None)
    serving = of(linear, devices=devices, heads=4, kv_heads=1)
    if said is None:
        refuse_unserved("vllm", serving)
    else:
        assert said in refusal("vllm", serving).message


@given(
    rows=st.integers(1, 64).map(lambda number: 32 * number),
    columns=st.integers(1, 16).map(lambda number: 128 * number),
    split=st.sampled_from([IN, OUT, None]),
    devices=st.integers(1, 16),
)
@settings(max_examples=300, deadline=None)
def test_what_vllm_takes_cuts_no_block(rows, columns, split, devices):
    """Restated by going through the devices and looking at where each one's share begins."""
    linear = served("x", rows, columns, split, scheme="FP8_BLOCK", group_size=None)
    side = {IN: columns, OUT: rows, None: 0}[split]
    good = all((number * side / devices) % 128 == 0 for number in range(1, devices))
    assert _takes(of(linear, devices=devices)) == good


def _takes(serving):
    try:
        refuse_unserved("vllm", serving)
    except RecipeError:
        return False
    return True


@pytest.mark.parametrize(
    ("rows", "devices", "said"),
    [(512, 4, None), (512, 8, "64 out features"), (192, 1, "192 out features")],
)
def test_vllm_wants_whole_blocks_of_every_expert(rows, devices, said):
    """On one device, too: up follows gate."""
    gate = served("experts.0.gate_proj", rows, 256, OUT, scheme="FP8_BLOCK", group_size=None, is_expert=True)
    if said is None:
        refuse_unserved("vllm", of(gate, devices=devices))
    else:
        assert said in refusal("vllm", of(gate, devices=devices)).message


@pytest.mark.parametrize(
    ("scheme", "columns", "devices", "is_taken"),
    [
        ("MXFP8A16", 96, 3, True),
        ("MXFP8A16", 96, 2, False),
        ("NVFP4A16", 96, 2, True),
        ("NVFP4A16", 96, 4, False),
        ("FP8A16", 24, 3, True),
        ("FP8A16", 24, 4, False),  # 6 codes are no words
        ("FP8A16_TENSOR", 24, 4, False),
        ("FP8_DYNAMIC", 24, 4, True),
        ("FP8_DYNAMIC_TENSOR", 24, 4, True),
        ("FP8A16", 22, 1, False),
    ],
)
def test_vllm_and_groups_and_words_of_floats(scheme, columns, devices, is_taken):
    down = served("mlp.down_proj", 64, columns, IN, scheme=scheme, group_size=None)
    if is_taken:
        refuse_unserved("vllm", of(down, devices=devices))
    else:
        refusal("vllm", of(down, devices=devices))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "split", "devices", "said"),
    [
        ("up", 2048, 7168, OUT, 16, None),  # gate and up: 2 * 128 rows
        ("up", 2048, 7168, OUT, 32, None),
        ("up", 2048, 7168, OUT, 64, "64 x 7168 on a device"),
        ("down", 7168, 2048, IN, 16, None),
        ("down", 7168, 2048, IN, 32, "7168 x 64 on a device"),
        ("up", 2880, 2880, OUT, 1, "5760 x 2880 on a device"),
    ],
)
def test_vllm_and_tiles_of_mxfp4_experts(name, rows, columns, split, devices, said):
    for scheme in ("MXFP4", "MXFP4A16"):
        shape = (f"experts.0.{name}_proj", rows, columns, split)
        expert = served(*shape, scheme=scheme, group_size=None, is_expert=True)
        if said is None:
            refuse_unserved("vllm", of(expert, devices=devices))
        else:
            assert said in refusal("vllm", of(expert, devices=devices)).message


def test_integers_with_one_scale_are_not_taken_by_vllm_and_by_transformers():
    linear = served("mlp.up_proj", 64, 128, OUT, scheme="W8A16", group_size=WHOLE_TENSOR)
    assert (
        "it takes integers by group or row; found 8 bits, symmetric, one scale"
        in refusal("vllm", of(linear)).message
    )
    assert "group_size -1" in ways_of("vllm", of(linear))
    refuse_unserved("transformers", of(linear))


@pytest.mark.parametrize("scheme", [*CODEBOOK_NAMES, "W8A16"])
def test_vllm_has_no_bitsandbytes_and_transformers_has(scheme):
    group_size = -1 if scheme == "W8A16" else None
    linear = served("mlp.up_proj", 64, 128, OUT, scheme=scheme, group_size=group_size)
    said = refusal("vllm", of(linear, layout="bitsandbytes")).message
    assert "it takes compressed-tensors, gptq or awq files; found bitsandbytes files (mlp.up_proj)" in said
    ways = ways_of("vllm", of(linear, layout="bitsandbytes"))
    assert all(way.startswith("format compressed-tensors") for way in ways)
    # No other layout has codebooks.
    assert (ways == ["format compressed-tensors"]) == (scheme == "W8A16")
    refuse_unserved("transformers", of(linear, layout="bitsandbytes"))
    expert = served("experts.0.up_proj", 64, 128, OUT, scheme=scheme, group_size=group_size, is_expert=True)
    said = refusal("transformers", of(linear, expert, layout="bitsandbytes")).message
    assert "files without quantized experts" in said and said.endswith(_KEEPING)


@pytest.mark.parametrize("scheme", _ALL)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_models_of_other_dtypes(scheme, dtype):
    linear = served("mlp.up_proj", 128, 128, OUT, scheme=scheme, group_size=None)
    serving = of(linear, dtype=dtype)
    if dtype in ("float16", "float32") and scheme[:2] in ("MX", "NV"):
        assert f"a model of {dtype}" in refusal("transformers", serving).message
    else:
        refuse_unserved("transformers", serving)
    if scheme == "NVFP4A16" and dtype == "float16":
        assert "NVFP4 in models of bfloat16" in refusal("vllm", serving).message
    elif scheme != "FP8A16_BLOCK":
        refuse_unserved("vllm", serving)


@pytest.mark.parametrize(
    ("dense", "experts", "is_taken"),
    [
        ("W4A16", "W4A16", True),
        ("W4A16", "W8A16", False),
        ("W8A16", "FP8A16", False),
        ("FP8A16", "FP8A16_TENSOR", True),
        ("FP8_DYNAMIC", "FP8A16", True),
        ("MXFP4", "MXFP4A16", True),
        ("FP8A16", "MXFP4A16", False),
        ("W8A8", "W8A16", False),
    ],
)
def test_transformers_unpacks_experts_as_the_first_linear(dense, experts, is_taken):
    sizes = {"W4A16": 32, "W8A16": -1}
    linear = served("q_proj", 128, 128, HEADS, scheme=dense, group_size=sizes.get(dense))
    shape = ("experts.0.up_proj", 128, 128, OUT)
    expert = served(*shape, scheme=experts, group_size=sizes.get(experts), is_expert=True)
    if is_taken:
        refuse_unserved("transformers", of(linear, expert))
    else:
        message = refusal("transformers", of(linear, expert)).message
        assert "experts in the scheme of the first linear of the file" in message
        # Those of Llama 4 become linears.
        refuse_unserved(
            "transformers", of(linear, expert, model_type="llama4_text", stores_each_expert=False)
        )


def test_transformers_drops_kept_experts_but_beside_fp8():
    for scheme, is_taken in (("FP8A16", True), ("W4A16", False), ("MXFP4A16", False), ("NVFP4A16", False)):
        group_size = 32 if scheme == "W4A16" else None
        linear = served("q_proj", 128, 128, HEADS, scheme=scheme, group_size=group_size)
        serving = of(linear, kept_experts=("experts.0.up_proj", "experts.1.up_proj"))
        if is_taken:
            refuse_unserved("transformers", serving)
        else:
            message = refusal("transformers", serving).message
            assert "found 2 experts kept as they are, such as experts.0.up_proj" in message
        refuse_unserved("vllm", serving)


def test_transformers_finds_experts_of_families_that_store_each_by_itself():
    linear = served("q_proj", 128, 128, HEADS, group_size=32)
    shape = ("experts.0.up_proj", 128, 128, OUT)
    expert = served(*shape, group_size=32, is_expert=True)
    serving = of(linear, expert, model_type="gpt_oss", stores_each_expert=False)
    assert "found routed experts of which a tensor holds several" in refusal("transformers", serving).message
    # Kept, they stay in their tensor.
    assert ways_of("transformers", serving) == [_KEEPING]
    kept = {"kept_experts": (expert.name,), "stores_each_expert": False}
    refuse_unserved("transformers", of(linear, model_type="gpt_oss", **kept))
    # Those of Llama 4 become linears wherever something is quantized.
    refuse_unserved("transformers", of(linear, expert, model_type="llama4", stores_each_expert=False))
    message = refusal("transformers", of(linear, model_type="llama4", **kept)).message
    assert "found 1 kept as they are, such as experts.0.up_proj" in message
