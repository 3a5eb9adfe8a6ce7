"""A plan says before any work what its target would reject, and the target changes nothing else."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quantlib.__main__ import main
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.errors import RecipeError
from quantlib.inprocess import quantize
from quantlib.job.bundle import bundle_of
from quantlib.job.parallel_splits import HEADS, IN, OUT
from quantlib.job.planner import build_plan
from quantlib.job.target_check import serving_of
from quantlib.schemes import FLOAT_NAMES
from quantlib.storage import open_store
from tests.support.tiny_jobs import save_tiny_tokenizer, tiny_options, tiny_source
from tests.support.tiny_models import save_tiny_checkpoint

_EXPERTS_KEPT = {"rules": [{"match": "*.experts.*", "keep": True}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("targets")


def rtn(root, **options):
    values = {"method": "rtn", "calibration": None, "evaluation": None, "group_size": 16}
    return tiny_options(root, **{**values, **options})


def family_serving(folder, family, settings, **options):
    tiny_source(folder / "source", family, **settings)
    request = rtn(folder, **options)
    plan, _ = build_plan(request, 1)
    config = json.loads((folder / "source" / "config.json").read_text())
    return serving_of(request, config, plan.blocks)


def seen(serving):
    return {
        (linear.name.rpartition(".")[2], linear.rows, linear.columns, linear.split): linear.count
        for linear in serving.linears
    }


def test_alike_linears_of_all_blocks_are_one_and_kept_ones_are_named(tmp_path):
    rules = [{"match": "*.1.mlp.down_proj", "keep": True}, {"match": "*.o_proj", "scheme": "W8A16"}]
    serving = family_serving(tmp_path, "llama", {}, rules=rules)
    assert serving.kept == ("model.layers.1.mlp.down_proj",)
    assert (serving.heads, serving.kv_heads) == (4, 2)
    # q has the shape of o but another scheme; k and v, gate and up are alike.
    assert seen(serving) == {
        ("q_proj", 64, 64, HEADS): 3,
        ("k_proj", 32, 64, HEADS): 6,
        ("o_proj", 64, 64, IN): 3,
        ("gate_proj", 96, 64, OUT): 6,
        ("down_proj", 64, 96, IN): 2,
    }
    assert {linear.scheme.bits for linear in serving.linears if linear.name.endswith("o_proj")} == {8}


def test_experts_are_told_from_what_every_token_goes_through(tmp_path):
    serving = family_serving(tmp_path, "qwen3_moe", {"moe_intermediate_size": 32, "num_experts": 4})
    experts = {linear.name: linear.count for linear in serving.linears if linear.is_expert}
    others = [linear.name for linear in serving.linears if not linear.is_expert]
    assert all("experts" in name for name in experts) and not any("experts" in name for name in others)
    # Four in each of two blocks, the first is dense; gate and up are alike.
    assert sorted(experts.values()) == [8, 16]
    assert (serving.dtype, serving.model_type, serving.stores_each_expert) == ("bfloat16", "qwen3_moe", True)
    assert serving.kept_experts == ()


def test_kept_experts_are_named_and_fused_ones_known(tmp_path):
    serving = family_serving(tmp_path, "gpt_oss", {"num_hidden_layers": 4}, **_EXPERTS_KEPT)
    # Gate, up and down of four experts in four blocks.
    assert len(serving.kept_experts) == 3 * 4 * 4
    assert all(".experts." in name for name in serving.kept_experts) and serving.kept == ()
    assert not serving.stores_each_expert


def test_transformers_takes_gptq_files_whose_experts_are_kept(tmp_path):
    tiny_source(tmp_path / "source", "qwen3_moe", moe_intermediate_size=32, num_experts=4, head_dim=32)
    options = {"format": "gptq", "target": "transformers"}
    with pytest.raises(
        RecipeError, match="found routed experts .* 23 more.*\n.*rule that keeps these linears"
    ):
        build_plan(rtn(tmp_path, **options), 1)
    build_plan(rtn(tmp_path, rules=[{"match": "*.experts.*", "keep": True}], **options), 1)


def test_latent_attention_has_no_heads_of_keys(tmp_path):
    serving = family_serving(tmp_path, "deepseek_v3", {}, group_size=-1)
    assert (serving.heads, serving.kv_heads) == (4, None)


def test_plan_is_refused_by_the_rules_of_its_target_and_not_without_one(root):
    build_plan(rtn(root, format="gptq"), 1)
    with pytest.raises(RecipeError, match=r"^vllm would not serve this output:\n- it takes gptq files with"):
        build_plan(rtn(root, target="vllm", format="gptq"), 1)
    # 64 / 4 = 16 columns of o_proj, 96 / 4 = 24 of down_proj; 4 heads, 2 of keys.
    build_plan(rtn(root, target="vllm", tensor_parallel=2), 1)
    with pytest.raises(RecipeError, match="96 in features over 4 devices, 24 each, in groups of 16"):
        build_plan(rtn(root, target="vllm", tensor_parallel=4), 1)
    build_plan(rtn(root, target="vllm", tensor_parallel=4, group_size=8), 1)


def test_target_is_no_part_of_the_identity_and_outputs_of_one_reading_may_have_several(root):
    plain, served = (
        build_plan(rtn(root, output=str(root / name), **options), 1)[0]
        for name, options in (
            ("plain", {"scheme": "W4A16_ASYM"}),
            ("served", {"target": "vllm", "tensor_parallel": 2}),
        )
    )
    same = build_plan(rtn(root, output=str(root / "served"), target="transformers"), 1)[0]
    assert same.identity() == served.identity() != plain.identity()
    bundle_of([plain, served])


def test_provenance_and_report_name_the_target_and_another_start_may_name_another(root):
    output = root / "made"
    report = quantize(rtn(root, output=str(output), target="vllm", tensor_parallel=2))
    assert (report["options"]["target"], report["options"]["tensor_parallel"]) == ("vllm", 2)
    provenance = json.loads((output / "quantmill_provenance.json").read_text())
    assert provenance["options"]["effective"]["target"] == "vllm"
    # Finished is finished: what would serve it is checked again, and nothing else is done.
    again = quantize(rtn(root, output=str(output), target="transformers"))
    assert again == json.loads(json.dumps(report))
    with pytest.raises(RecipeError, match="transformers would not serve this output"):
        quantize(rtn(root, output=str(output), target="transformers", tensor_parallel=2))


def test_command_line_prints_what_the_plan_was_checked_for(root, capsys):
    rtn(root)
    options = "--method rtn --group-size 16 --device cpu --runner inprocess --target vllm"
    words = f"plan {root}/source {root}/out {options}".split()
    assert main([*words, "--tensor-parallel", "2"]) == 0
    assert "\nchecked for vllm on 2 devices: breaks none of its rules" in capsys.readouterr().out
    assert main([*words, "--tensor-parallel", "4"]) == 2
    assert "error: vllm would not serve this output:" in capsys.readouterr().err


def _takes(request):
    try:
        build_plan(request, 1)
    except RecipeError:
        return False
    return True


def _logits(folder, dtype=torch.float32):
    model, notes = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits


@pytest.mark.parametrize("scheme", ["W8A16", "W8A16_ASYM"])
@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("qwen3_moe", {"moe_intermediate_size": 32, "num_experts": 4})]
)
def test_transformers_loads_as_it_is_what_its_rules_take_and_nothing_else(tmp_path, family, settings, scheme):
    source = tiny_source(tmp_path / "source", family, **settings)
    request = rtn(tmp_path, scheme=scheme)
    quantize(request)
    is_taken = _takes(rtn(tmp_path, scheme=scheme, target="transformers"))
    assert is_taken == (scheme == "W8A16")
    if is_taken:
        original = _logits(source)
        assert (_logits(tmp_path / "output") - original).abs().max() < 0.05 * original.abs().max()
    else:
        with pytest.raises(RuntimeError):
            _logits(tmp_path / "output")


# All experts are chosen: which are is not what is compared.
_MOE = (
    "qwen3_moe",
    {
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_experts": 2,
        "num_experts_per_tok": 2,
    },
)
_FUSED = [("gpt_oss", {}), ("llama4_text", {"num_local_experts": 2, "num_experts_per_tok": 2})]
_LLAMA = ("llama", {"intermediate_size": 256})
_ATTENTION_IN_8_BITS = {"rules": [{"match": "*.self_attn.*", "scheme": "W8A16"}]}
_EXPERTS_BY_WEIGHT = {"rules": [{"match": "*.experts.*", "scheme": "FP8A16_TENSOR"}]}


def _plain(output, folder):
    """A checkpoint that nothing has to unpack: what an output stands for, in the source's dtype."""
    store = open_store("file:///")
    checkpoint = open_source(store, f"file://{output}", levels_dtype="F32")
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    dtype = getattr(torch, config["dtype"])
    levels = read_tensors(store, checkpoint, list(checkpoint.tensors))
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in levels.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def _is_loaded_right(output, plain, dtype):
    try:
        found = _logits(output, dtype)
    except (RuntimeError, AssertionError):
        return False
    expected = _logits(plain, dtype)
    return bool((found - expected).abs().max() < 0.2 * expected.abs().max())


# Taken or not, transformers itself says: no expectation is written down here.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scheme", "options", "dtype"),
    [
        *[(_LLAMA, scheme, {}, dtype) for scheme in FLOAT_NAMES for dtype in ("bfloat16", "float16")],
        (_LLAMA, "W8A16", {"group_size": 0}, "bfloat16"),
        *[(_MOE, scheme, {}, "bfloat16") for scheme in FLOAT_NAMES],
        (_MOE, "W8A16", {"group_size": 0}, "bfloat16"),
        (_MOE, "W8A8", {}, "bfloat16"),
        *[(_MOE, scheme, _EXPERTS_KEPT, "bfloat16") for scheme in ("W4A16", "FP8A16", "MXFP4A16")],
        (_MOE, "W4A16", _ATTENTION_IN_8_BITS, "bfloat16"),
        (_MOE, "FP8A16", _EXPERTS_BY_WEIGHT, "bfloat16"),
        *[(family, "W8A16", {"group_size": 16}, "bfloat16") for family in _FUSED],
        *[(family, "W8A16", {"group_size": 16, **_EXPERTS_KEPT}, "bfloat16") for family in _FUSED],
    ],
)
def test_transformers_loads_what_its_rules_take_and_nothing_else(tmp_path, family, scheme, options, dtype):
    name, settings = family
    shape = {} if family in _FUSED else {"num_hidden_layers": 2, "hidden_size": 256}
    save_tiny_checkpoint(tmp_path / "source", name, dtype=getattr(torch, dtype), **shape, **settings)
    save_tiny_tokenizer(tmp_path / "source")
    values = {"scheme": scheme, "group_size": 16 if scheme == "W4A16" else None, **options}
    request = rtn(tmp_path, **values)
    quantize(request)
    output = tmp_path / "output"
    # transformers has no names for single experts of Llama 4 in a plain file; 8 bits are near the source.
    plain = tmp_path / "source" if name == "llama4_text" else _plain(output, tmp_path / "plain")
    is_right = _is_loaded_right(output, plain, getattr(torch, dtype))
    assert is_right == _takes(rtn(tmp_path, target="transformers", **values))
