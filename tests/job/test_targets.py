"""What engines reject: shapes of real models, each decided by hand, and one message for all that is wrong."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import RecipeError
from quantlib.job.parallel_splits import IN, OUT
from quantlib.job.serving import Serving
from quantlib.job.targets import TARGETS, default_format, refuse_unserved
from quantlib.schemes import INTEGER_NAMES, WHOLE_ROW
from quantlib.simulation.config_shapes import shipped_config
from tests.support.servings import llama, refusal, served

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def deepseek(group_size, devices):
    """DeepSeek-V3, with one linear of a kind and 256 experts in each of 58 blocks."""
    config = shipped_config("deepseek-v3")
    hidden, inner, expert = (
        config[f"{name}_size"] for name in ("hidden", "intermediate", "moe_intermediate")
    )
    heads, q_rank, kv_rank = (config[n] for n in ("num_attention_heads", "q_lora_rank", "kv_lora_rank"))
    dense = (
        ("q_a_proj", q_rank, hidden, None),
        ("q_b_proj", heads * 192, q_rank, OUT),
        ("kv_a_proj_with_mqa", kv_rank + 64, hidden, None),
        ("kv_b_proj", heads * 256, kv_rank, OUT),
        ("o_proj", hidden, heads * 128, IN),
        ("up_proj", inner, hidden, OUT),
        ("down_proj", hidden, inner, IN),
    )
    routed = (("experts.0.up_proj", expert, hidden, OUT), ("experts.0.down_proj", hidden, expert, IN))
    linears = (
        *(served(*shape, group_size=group_size) for shape in dense),
        *(served(*shape, group_size=group_size, count=58 * 256, is_expert=True) for shape in routed),
    )
    return Serving(linears=linears, format="compressed-tensors", tensor_parallel=devices, heads=heads)


@pytest.mark.parametrize(
    ("name", "group_size", "devices"),
    [
        ("llama-3.1-70b", 128, 8),  # 28672 / 8 = 3584 = 28 * 128, 8192 / 8 = 1024 = 8 * 128
        ("llama-3.1-70b", 128, 32),  # 28672 / 32 = 896 = 7 * 128; 8 heads of keys, each on 4 devices
        ("llama-3.1-70b", 64, 64),  # 28672 / 64 = 448 = 7 * 64, 8192 / 64 = 128
        ("llama-3.1-70b", WHOLE_ROW, 64),  # a scale of a row is repeated
        ("llama-3.1-405b", 128, 32),  # 53248 / 32 = 1664 = 13 * 128
        ("llama-3.1-405b", 64, 64),  # 53248 / 64 = 832 = 13 * 64
        ("llama-3.1-405b", 32, 128),  # 53248 / 128 = 416 = 13 * 32
    ],
)
def test_vllm_takes_llamas_whose_shards_hold_whole_groups(name, group_size, devices):
    for layout in ("compressed-tensors", "gptq"):
        refuse_unserved("vllm", llama(shipped_config(name), group_size, devices, layout=layout))


@pytest.mark.parametrize(
    ("name", "group_size", "devices", "said"),
    [
        ("llama-3.1-70b", 128, 64, r"28672 in features over 64 devices, 448 each, in groups of 128 \(down"),
        ("llama-3.1-405b", 128, 64, "53248 in features over 64 devices, 832 each"),
        ("llama-3.1-405b", 64, 128, "53248 in features over 128 devices, 416 each, in groups of 64"),
        ("llama-3.1-70b", 128, 3, "64 attention heads over 3 devices"),
        ("llama-3.1-70b", 64, 128, "64 attention heads over 128 devices"),
    ],
)
def test_vllm_rejects_llamas_whose_shards_do_not(name, group_size, devices, said):
    for layout in ("compressed-tensors", "gptq"):
        error = refusal("vllm", llama(shipped_config(name), group_size, devices, layout=layout))
        assert re.search(said, error.message)


@pytest.mark.parametrize(
    ("group_size", "devices", "said"),
    [
        (64, 1, None),
        (64, 3, None),  # 576 / 3 = 192 = 3 * 64, 1536 / 3 = 512 = 8 * 64, 9 and 3 heads over 3
        (64, 2, "9 attention heads over 2 devices"),
        (64, 9, r"1536 out features over 9 devices \(gate_proj and 2 more\)"),
        (96, 3, "1536 in features over 3 devices, 512 each, in groups of 96"),  # but 576 / 3 = 2 * 96
    ],
)
def test_vllm_and_smollm2(group_size, devices, said):
    serving = llama(SMOLLM2, group_size, devices)
    if said is None:
        refuse_unserved("vllm", serving)
    else:
        assert re.search(said, refusal("vllm", serving).message)


@pytest.mark.parametrize(
    ("group_size", "devices", "said"),
    [
        (128, 16, None),  # 2048 / 16 = 128, 18432 / 16 = 1152 = 9 * 128, 16384 / 16 = 1024
        (64, 32, None),  # 2048 / 32 = 64, 18432 / 32 = 576 = 9 * 64
        # 18432 / 32 = 576 is no multiple of 128, nor is 2048 / 32 = 64, of 58 x 256 experts.
        (128, 32, r"18432 in features .* 576 each, in groups of 128 \(down_proj and 14848 more\)"),
        (WHOLE_ROW, 1, "routed experts of integers with groups, not one scale a row"),
    ],
)
def test_vllm_and_deepseek_v3(group_size, devices, said):
    serving = deepseek(group_size, devices)
    if said is None:
        refuse_unserved("vllm", serving)
    else:
        assert re.search(said, refusal("vllm", serving).message)


def test_vllm_takes_experts_of_gptq_files_with_halved_groups():
    """2048 over 32 devices are 64: groups of 128 are read as twice 64."""
    expert = served("experts.0.down_proj", 7168, 2048, IN, is_expert=True)
    refuse_unserved("vllm", Serving(linears=(expert,), format="gptq", tensor_parallel=32))
    for devices, layout in ((32, "compressed-tensors"), (128, "gptq")):
        serving = Serving(linears=(expert,), format=layout, tensor_parallel=devices)
        assert "in groups of 128" in refusal("vllm", serving).message


@pytest.mark.parametrize(
    ("target", "layout", "scheme", "group_size", "good"),
    [
        *[("vllm", "compressed-tensors", scheme, 128, True) for scheme in INTEGER_NAMES],
        *[("vllm", "gptq", scheme, 128, scheme in ("W4A16", "W8A16")) for scheme in INTEGER_NAMES],
        ("vllm", "gptq", "W4A16", 256, False),
        ("vllm", "gptq", "W4A16", WHOLE_ROW, True),
        *[
            ("transformers", "compressed-tensors", name, 128, not name.endswith("ASYM"))
            for name in INTEGER_NAMES
        ],
        *[("transformers", "gptq", name, 128, True) for name in INTEGER_NAMES],
    ],
)
def test_schemes_that_engines_take(target, layout, scheme, group_size, good):
    serving = llama(shipped_config("llama-3.1-70b"), group_size, 1, scheme=scheme, layout=layout)
    if good:
        refuse_unserved(target, serving)
    else:
        assert "(q_proj and 6 more)" in refusal(target, serving).message


def test_transformers_takes_no_experts_no_mix_and_nothing_kept_in_gptq_files_and_one_device():
    experts = served("experts.0.up_proj", 64, 128, OUT, is_expert=True, count=12)
    linears = (served("a", 128, 128, count=3), served("b", 128, 128, scheme="W8A16"), experts)
    serving = Serving(linears=linears, kept=("c",), format="gptq", tensor_parallel=1)
    message = refusal("transformers", serving).message
    assert "found routed experts (experts.0.up_proj and 11 more)" in message
    assert "found 8 bits, symmetric, groups of 128 besides 4 bits, symmetric, groups of 128 (b)" in message
    assert message.endswith("What would do instead: format compressed-tensors")
    two = llama(SMOLLM2, 64, 2)
    assert "found tensor_parallel 2" in refusal("transformers", two).message
    assert refusal("transformers", two).message.endswith("instead: tensor_parallel 1")


def test_one_error_says_all_of_every_rule_how_many_which_and_what_would_do():
    linears = (
        served("model.layers.0.mlp.down_proj", 8192, 28672, IN, group_size=256, count=80),
        served("model.layers.0.mlp.up_proj", 28672, 8192, OUT, scheme="W3A16", count=80),
        served("model.layers.0.self_attn.o_proj", 8192, 8192, IN, count=80),
    )
    error = refusal("vllm", Serving(linears=linears, format="gptq", tensor_parallel=32, heads=64, kv_heads=8))
    lines = error.message.splitlines()
    assert lines[0] == "vllm would not serve this output:"
    assert lines[1].startswith(
        "- it takes gptq files with symmetric 4 or 8 bits; found 3 bits, symmetric, groups of 128"
        " (model.layers.0.mlp.up_proj and 79 more) (vLLM 0.33.0, model_executor"
    )
    assert "groups of 256 (model.layers.0.mlp.down_proj and 79 more)" in lines[2]
    assert "28672 in features over 32 devices, 896 each, in groups of 256" in lines[3]
    assert len(lines) == 5
    assert error.facts["option"] == "target"
    assert [row["linears"] for row in error.facts["findings"]] == [80, 80, 80]
    # 896 = 7 * 128 = 14 * 64 = 28 * 32; three bits need another scheme besides.
    ways = lines[4].removeprefix("What would do instead: ").split("; or ")
    assert "scheme W4A16 with group_size 128" in ways
    assert "scheme W8A16 with group_size -1" in ways
    assert ways[-1] == "a rule that keeps these linears as they are"


@pytest.mark.parametrize(
    ("group_size", "devices", "ways"),
    [
        (128, 64, ["tensor_parallel 32", "group_size 64", "group_size 32", "group_size -1"]),
        (128, 3, ["tensor_parallel 2"]),
        (64, 128, ["tensor_parallel 64"]),
    ],
)
def test_what_would_do_is_the_smallest_change(group_size, devices, ways):
    message = refusal("vllm", llama(shipped_config("llama-3.1-70b"), group_size, devices)).message
    found = message.splitlines()[-1].removeprefix("What would do instead: ").split("; or ")
    assert [way for way in found if not way.startswith("a rule")] == ways


def _takes(serving):
    try:
        refuse_unserved("vllm", serving)
    except RecipeError:
        return False
    return True


@given(
    rows=st.integers(1, 40).map(lambda n: 32 * n),
    groups=st.integers(1, 40),
    group_size=st.sampled_from([8, 16, 24, 32, 64, 128, WHOLE_ROW]),
    scheme=st.sampled_from(INTEGER_NAMES),
    split=st.sampled_from([IN, OUT, None]),
    devices=st.integers(1, 16),
    heads=st.integers(1, 16),
    kv_heads=st.integers(1, 16),
)
@settings(max_examples=400, deadline=None)
def test_what_vllm_takes_divides_as_every_rule_says(
    rows, groups, group_size, scheme, split, devices, heads, kv_heads
):
    """Restated by going through the devices and looking at where each one's share begins and ends."""
    columns = groups * (32 if group_size == WHOLE_ROW else group_size)
    linear = served("x", rows, columns, split, scheme=scheme, group_size=group_size)
    serving = Serving(
        linears=(linear,),
        format="compressed-tensors",
        tensor_parallel=devices,
        heads=heads,
        kv_heads=kv_heads,
    )
    bits, is_asymmetric = int(scheme[1]), scheme.endswith("ASYM")
    side = {IN: columns, OUT: rows, None: devices}[split]
    borders = [number * side / devices for number in range(devices + 1)]
    good = all(border == int(border) for border in borders)
    # Whole heads for every device; heads of keys in equal numbers, or each on equally many devices.
    good = good and heads in [devices * each for each in range(1, 17)]
    good = good and (
        kv_heads in [devices * n for n in range(1, 17)] or devices in [kv_heads * n for n in range(1, 17)]
    )
    if split == IN and group_size != WHOLE_ROW:
        group_borders = set(range(0, columns + 1, group_size))
        good = good and all(border in group_borders for border in borders)
    if devices > 1 and (split == IN or (split == OUT and is_asymmetric)):
        word_borders = {word * 32 / bits for word in range(side * bits // 32 + 1)}
        good = good and all(border in word_borders for border in borders)
    assert _takes(serving) == good


@pytest.mark.parametrize(
    ("target", "layout", "scheme", "found"),
    [
        ("transformers", "awq", "W4A16", "awq"),
        ("transformers", "gguf", "W4A16", "gguf"),
        ("bitsandbytes", "awq", "W4A16", "awq"),
        *(
            (target, "compressed-tensors", scheme, found)
            for target in ("bitsandbytes", "llama.cpp")
            for scheme, found in (
                ("FP8A16", "8 bits, floats e4m3, one scale a row"),
                ("MXFP8", "8 bits, floats e4m3, groups of 32 with powers of two, inputs rounded"),
            )
        ),
    ],
)
def test_output_whose_rules_are_not_known_is_refused_and_not_waved_through(target, layout, scheme, found):
    linear = served("mlp.up_proj", 512, 256, scheme=scheme, group_size=None)
    said = refusal(target, Serving(linears=(linear,), format=layout, tensor_parallel=1))
    files, schemes = {
        "bitsandbytes": ("bitsandbytes", ", and of NF4, NF4_DQ, FP4, FP4_DQ"),
        "transformers": ("compressed-tensors and gptq and bitsandbytes", ", and of FP8A16, FP8A16_TENSOR"),
        "llama.cpp": ("gguf", ""),
    }[target]
    assert f"is known of integers in {files} files{schemes}" in said.message
    assert f"; found {found}" in said.message


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_whole_rows_whose_inputs_are_rounded_are_taken_by_those_who_round_them(scheme):
    """Bytes need not fill words: 35 in features are on each of 2 devices."""
    down = served("mlp.down_proj", 64, 70, IN, scheme=scheme, group_size=None)
    expert = served("experts.0.down_proj", 64, 70, IN, scheme=scheme, group_size=None, is_expert=True)
    refuse_unserved("vllm", Serving(linears=(down, expert), format="compressed-tensors", tensor_parallel=2))
    uneven = Serving(linears=(down, expert), format="compressed-tensors", tensor_parallel=4)
    assert "70 in features over 4 devices" in refusal("vllm", uneven).message
    refuse_unserved("transformers", Serving(linears=(down,), format="compressed-tensors", tensor_parallel=1))
    both = Serving(linears=(down, expert), format="compressed-tensors", tensor_parallel=1)
    message = refusal("transformers", both).message
    assert "inputs stay as they are; found 8 bits" in message and "(experts.0.down_proj)" in message
    # Experts are unpacked as the first linear is: W8A8 has no scheme beside it that is packed so.
    keeping = "a rule that keeps these linears as they are"
    ways = {"W8A8": [], "FP8_DYNAMIC": ["scheme FP8A16", "scheme FP8A16_TENSOR", keeping]}[scheme]
    said = f"What would do instead: {'; or '.join(ways)}" if ways else "Nothing that can be set here would do"
    assert message.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("linear", "devices", "said"),
    [
        (served("down", 8192, 28672, IN), 8, None),  # 3584 = 28 * 128
        (served("down", 8192, 28672, IN, scheme="W4A16_ASYM"), 32, None),
        (served("down", 8192, 28672, IN), 64, "448 each, in groups of 128"),
        (served("down", 8192, 28672, IN, group_size=WHOLE_ROW), 1, None),
        (served("down", 8192, 28672, IN, group_size=WHOLE_ROW), 2, "2 devices with one scale a row"),
        (served("up", 28672, 8192, OUT, group_size=WHOLE_ROW), 8, None),
        # 8 codes of a word, symmetric or not; along in features nothing is packed: 36 of them are no words.
        (served("up", 24, 128, OUT), 3, None),
        (served("up", 24, 128, OUT), 2, "12 out features on each of 2 devices"),
        (served("down", 64, 72, IN, group_size=36), 2, None),
        (served("qkv", 24, 128, None), 2, None),
        (served("up", 64, 128, OUT, scheme="W8A16"), 1, "awq files with 4 bits; found 8 bits"),
        (served("e.up", 64, 128, OUT, is_expert=True), 2, None),
        (served("e.up", 64, 128, OUT, is_expert=True, group_size=WHOLE_ROW), 1, "experts with groups"),
        # Groups of experts are halved down to 32.
        (served("e.down", 64, 192, IN, is_expert=True, group_size=64), 2, None),
        (served("e.down", 64, 160, IN, is_expert=True, group_size=32), 2, "80 each, in groups of 32"),
    ],
)
def test_vllm_and_awq_files(linear, devices, said):
    serving = Serving(linears=(linear,), format="awq", tensor_parallel=devices)
    if said is None:
        refuse_unserved("vllm", serving)
    else:
        assert said in refusal("vllm", serving).message


@pytest.mark.parametrize(
    ("devices", "layout", "said"),
    [
        (17, "gguf", "it takes at most 16 devices; found tensor_parallel 17"),
        (17, "gguf", "What would do instead: tensor_parallel 16"),
        (1, "gptq", "is known of integers in gguf files; found gptq"),
    ],
)
def test_llama_cpp_takes_so_many_devices_and_its_own_files(devices, layout, said):
    linear = served("mlp.up_proj", 512, 256, group_size=32)
    assert (
        said
        in refusal("llama.cpp", Serving(linears=(linear,), format=layout, tensor_parallel=devices)).message
    )


def test_llama_cpp_cuts_rows_anywhere():
    refuse_unserved("llama.cpp", llama(SMOLLM2, 32, 7, layout="gguf"))


def test_every_target_has_a_default_format():
    found = {target: default_format(target, "W4A16") for target in (None, *TARGETS)}
    assert found.pop("bitsandbytes") == "bitsandbytes"
    assert found.pop("llama.cpp") == "gguf"
    assert set(found.values()) == {"compressed-tensors"}


def test_bitsandbytes_takes_linears_on_one_device_and_no_experts():
    rows = served("mlp.up_proj", 512, 256, scheme="W8A16", group_size=WHOLE_ROW)
    expert = served("experts.0.up_proj", 512, 256, scheme="W8A16", group_size=WHOLE_ROW, is_expert=True)
    refuse_unserved("bitsandbytes", Serving(linears=(rows,), format="bitsandbytes", tensor_parallel=1))
    said = refusal(
        "bitsandbytes", Serving(linears=(rows, expert), format="bitsandbytes", tensor_parallel=2)
    ).message
    assert "stay as they are; found routed experts (experts.0.up_proj) (transformers 5.23.0" in said
    assert "one device a matrix, as far as is known here; found tensor_parallel 2" in said
    said = refusal(
        "bitsandbytes", Serving(linears=(rows, expert), format="bitsandbytes", tensor_parallel=1)
    ).message
    assert "What would do instead: a rule that keeps these linears as they are" in said
