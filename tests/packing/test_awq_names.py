"""Names of kept linears in AWQ files, by transformers' own rule and those of engines."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from quantlib.errors import PackingError
from quantlib.packing import awq_format
from quantlib.schemes import WeightScheme

W4 = WeightScheme(bits=4, is_symmetric=False, group_size=32)
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERTS = tuple(f"mlp.experts.{i}.{name}_proj" for i in range(3) for name in ("gate", "up", "down"))
OUTSIDE = ["lm_head", "model.visual.blocks.1.attn.qkv", "model.visual.merger.mlp.0", "mtp.fc"]
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def entries_of(schemes, outside=OUTSIDE):
    return awq_format.quantization_config(schemes, outside)["modules_to_not_convert"]


def sglang_keeps(entries, name):
    return any(entry in name for entry in entries)


def vllm_keeps(entries, name):
    """Of a fused projection it asks for each part, which must agree."""
    module, _, last = name.rpartition(".")
    answers = {sglang_keeps(entries, f"{module}.{part}") for part in PARTS.get(last, (last,))}
    assert len(answers) == 1
    return answers.pop()


def vllm_renamed(entries):
    """As vLLM renames entries of Qwen's vision models before it matches them."""
    prefixes = {
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.layers.": "language_model.model.layers.",
    }
    return [
        next((new + entry.removeprefix(old) for old, new in prefixes.items() if entry.startswith(old)), entry)
        for entry in entries
    ]


def transformers_keeps(entries, name):
    return not should_convert_module(name, entries)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_reader_keeps_what_is_kept_and_nothing_else(data):
    schemes = {}
    for layer in data.draw(st.sets(st.integers(0, 25), min_size=1, max_size=9)):
        for set_ in (
            ATTENTION[:3],
            ATTENTION[3:],
            *data.draw(st.sampled_from([(MLP[:2], MLP[2:]), (EXPERTS,)])),
        ):
            kept = data.draw(st.booleans())
            schemes |= {f"model.layers.{layer}.{name}": None if kept else W4 for name in set_}
        if f"model.layers.{layer}.{EXPERTS[0]}" in schemes:
            schemes[f"model.layers.{layer}.mlp.gate"] = None
    schemes["model.layers.26.mlp.up_proj"] = W4
    entries = entries_of(schemes)
    for name in [*schemes, *OUTSIDE]:
        is_kept = schemes.get(name) is None
        for keeps in transformers_keeps, vllm_keeps, sglang_keeps:
            assert keeps(entries, name) == is_kept, (keeps, name)
        assert (
            awq_format.scheme_of(awq_format.quantization_config(schemes, OUTSIDE), name) is None
        ) == is_kept


@pytest.mark.parametrize("kept", [1, 10])
def test_layer_that_is_kept_says_nothing_of_one_whose_number_begins_alike(kept):
    names = [f"model.layers.{i}.{name}" for i in (1, 10, 100) for name in (*ATTENTION, *MLP)]
    schemes = {name: None if f".{kept}." in name else W4 for name in names}
    entries = entries_of(schemes)
    fused = [
        f"model.layers.{i}.{name}"
        for i in (1, 10, 100)
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    ]
    for name in [*names, *fused]:
        assert sglang_keeps(entries, name) == (f".{kept}." in name), name
        assert vllm_keeps(entries, name) == (f".{kept}." in name), name


def test_experts_that_are_kept_are_so_as_a_whole():
    names = [f"model.layers.{i}.{name}" for i in (2, 20) for name in (*ATTENTION, *EXPERTS)]
    entries = entries_of({name: None if ".2.mlp" in name else W4 for name in names})
    assert vllm_keeps(entries, "model.layers.2.mlp.experts")
    assert not vllm_keeps(entries, "model.layers.20.mlp.experts")


def test_names_whose_beginning_readers_change_are_found():
    entries = entries_of({"model.layers.3.mlp.up_proj": W4, "model.layers.3.mlp.gate": None})
    renamed = vllm_renamed(entries)
    assert vllm_keeps(renamed, "visual.blocks.1.attn.qkv")
    assert vllm_keeps(renamed, "language_model.model.layers.3.mlp.gate")
    assert not vllm_keeps(renamed, "language_model.model.layers.3.mlp.up_proj")
    old = ["visual.blocks.1.attn.qkv"]
    assert transformers_keeps(entries_of({"model.layers.3.mlp.up_proj": W4}, old), f"model.{old[0]}")


def test_linear_that_cannot_be_kept_by_name_alone_is_refused():
    schemes = {"model.layers.0.mlp.gate": None, "model.layers.0.mlp.gate_proj": W4}
    with pytest.raises(PackingError, match=r"mlp\.gate cannot be kept while .*gate_proj is quantized"):
        awq_format.quantization_config(schemes)
