"""Every tensor of a source has a state and a reason, from plan to verification, whatever the source holds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.__main__ import main
from quantlib.checkpoint.index import open_checkpoint
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import UnsupportedModelError
from quantlib.inprocess import quantize
from quantlib.job.accounting import account
from quantlib.job.planner import build_plan
from quantlib.model.skeleton import load_skeleton
from quantlib.packing import FORMATS
from quantlib.storage import open_store
from tests.support.format_limits import held_scheme
from tests.support.tiny_jobs import tiny_options, tiny_source, tiny_text
from tests.support.tiny_models import read_all_tensors

RTN = {"method": "rtn", "calibration": None, "evaluation": None}
EXTRA = "extra.safetensors"
# tests/job/test_gguf_output.py damages the others.
IN_SAFETENSORS = [name for name in FORMATS if name != "gguf"]


def add_tensors(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Store more tensors beside those that transformers wrote."""
    save_file(tensors, source / EXTRA)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, EXTRA)
    path.write_text(json.dumps(index))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def matrix(rows=32, columns=64) -> torch.Tensor:
    return torch.randn(rows, columns).to(torch.bfloat16)


def held_options(format_name) -> dict:
    """Options of a scheme that the format holds."""
    scheme = held_scheme(format_name)
    return {"format": format_name, "scheme": f"W{scheme.bits}A16", "group_size": scheme.group_size}


def reasons_of(plan) -> dict[str, tuple[str, str]]:
    """Pattern of a name -> state and reason; patterns in two accounts are left out of these tests."""
    return {name: (found.state, found.reason) for found in plan.accounts for name in found.names}


def converted(root: Path, **options):
    """A finished conversion and its verification; every source tensor is in exactly one account."""
    made = tiny_options(root, **{**RTN, **options})
    report = quantize(made)
    store = open_store("file:///")
    result = verify_checkpoint(store, f"file://{made.output}", f"file://{made.source}")
    tensors = read_all_tensors(Path(made.source))
    assert result.findings == ()
    assert sum(found.count for found in result.accounts) == len(tensors)
    assert sum(found.size_bytes for found in result.accounts) == sum(t.nbytes for t in tensors.values())
    assert [found["count"] for found in report["tensors"]] == [found.count for found in result.accounts]
    return build_plan(made, 1)[0], read_all_tensors(Path(made.output)), tensors


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (
            "deepseek_v3",
            {"moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16},
        ),
        ("glm4_moe", {"moe_intermediate_size": 32, "head_dim": 16}),
    ],
)
def test_layers_for_next_tokens_are_copied_and_said_not_to_be_quantized(tmp_path, family, settings):
    source = tiny_source(tmp_path / "source", family, **settings)
    later = {
        "model.layers.3.eh_proj.weight": matrix(64, 128),
        "model.layers.3.enorm.weight": torch.ones(64, dtype=torch.bfloat16),
        "model.layers.3.mlp.experts.0.up_proj.weight": matrix(),
        "model.layers.3.self_attn.kv_b_proj.weight": matrix(),
        "model.layers.3.shared_head.head.weight": matrix(96, 64),
    }
    add_tensors(source, later)
    plan, output, _ = converted(tmp_path)
    found = reasons_of(plan)
    for name, tensor in later.items():
        pattern = name.replace(".3.", ".*.").replace(".0.", ".*.")
        if "experts" not in name and "kv_b_proj" not in name:
            assert found[pattern][0] == "copied" and "layer after the last block" in found[pattern][1]
        assert torch.equal(output[name], tensor)
    config = json.loads((tmp_path / "output" / "config.json").read_text())["quantization_config"]
    names = {name.removesuffix(".weight") for name, tensor in later.items() if tensor.ndim == 2}
    assert names <= set(config["ignore"])
    assert not names & set(config["config_groups"]["group_0"]["targets"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_other_towers_are_copied_and_named(tmp_path, family):
    tiny_source(tmp_path / "source", family, num_hidden_layers=4)
    plan, output, tensors = converted(tmp_path, group_size=16)
    towers = {name for name in tensors if "vis" in name or "projector" in name}
    assert towers and all(torch.equal(output[name], tensors[name]) for name in towers)
    (found,) = [a for a in plan.accounts if "does not run through" in a.reason]
    assert (found.state, found.count) == ("copied", len(towers))
    assert found.size_bytes == sum(tensors[name].nbytes for name in towers)


@pytest.mark.parametrize(
    ("is_tied", "is_stored", "embedding", "head"),
    [
        (True, False, "tied to the head by config.json", None),
        (True, True, "before the blocks", "ties to the embedding but that is stored, and used"),
        (False, True, "before the blocks", "linear outside the blocks, such as the head"),
    ],
)
def test_heads_are_told_apart_by_config_and_name(tmp_path, is_tied, is_stored, embedding, head):
    source = tiny_source(tmp_path / "source", tie_word_embeddings=not is_stored)
    change_config(source, tie_word_embeddings=is_tied)
    plan, output, tensors = converted(tmp_path)
    found = reasons_of(plan)
    assert found["model.embed_tokens.weight"][0] == "copied"
    assert embedding in found["model.embed_tokens.weight"][1]
    assert ("lm_head.weight" in output) == (head is not None)
    if head is not None:
        assert head in found["lm_head.weight"][1]
        assert torch.equal(output["lm_head.weight"], tensors["lm_head.weight"])


def test_stored_buffers_and_what_nobody_knows_are_copied_with_their_reasons(tmp_path):
    source = tiny_source(tmp_path / "source")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8.0),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(8.0) + 1,
        "score.weight": matrix(2, 64),
    }
    add_tensors(source, extra)
    plan, output, _ = converted(tmp_path)
    found = reasons_of(plan)
    assert found["model.layers.*.self_attn.rotary_emb.inv_freq"] == (
        "copied",
        "buffer that the model computes by itself",
    )
    assert found["score.weight"] == ("copied", "used by no part of the model")
    assert all(torch.equal(output[name], tensor) for name, tensor in extra.items())
    assert "score" in plan.kept_linears


def test_what_transformers_ignores_is_named(tmp_path):
    settings = {"num_hidden_layers": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    source = tiny_source(tmp_path / "source", "qwen3_next", **settings)
    add_tensors(source, {"mtp.layers.0.mlp.up_proj.weight": matrix()})
    plan, _, _ = converted(tmp_path, group_size=16)
    assert reasons_of(plan)["mtp.layers.*.mlp.up_proj.weight"][1].startswith("ignored by transformers")


@pytest.mark.parametrize(
    ("family", "router"), [("qwen3_moe", "mlp.gate"), ("mixtral", "block_sparse_moe.gate"), ("llama", None)]
)
def test_routers_are_named_as_kept_whatever_they_are_to_transformers(tmp_path, family, router):
    source = tiny_source(tmp_path / "source", family)
    plan, _, _ = converted(tmp_path, group_size=8)
    stored = {name.removesuffix(".weight") for name in read_all_tensors(source)}
    routers = {name for name in stored if router is not None and name.endswith(router)}
    assert (len(routers) > 0) == (router is not None)
    # Engines build some of them as linears, which the config must tell to leave alone.
    config = json.loads((Path(plan.output.removeprefix("file://")) / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert set(ignored) == {*routers, "lm_head"}
    assert len(ignored) == len(set(ignored))


def test_biases_and_kept_linears_have_their_reasons(tmp_path):
    tiny_source(tmp_path / "source", attention_bias=True)
    rules = [{"match": "*.down_proj", "keep": True}, {"match": "*.o_proj", "scheme": "W8A16"}]
    plan, _, _ = converted(tmp_path, rules=rules)
    found = reasons_of(plan)
    at = "model.layers.*"
    assert found[f"{at}.self_attn.q_proj.bias"] == ("copied", "bias of a linear")
    assert found[f"{at}.mlp.down_proj.weight"] == ("copied", "weight of a linear that a rule keeps")
    assert found[f"{at}.self_attn.o_proj.weight"] == ("quantized", "to 8 bits, symmetric, groups of 32")
    assert found[f"{at}.mlp.up_proj.weight"] == ("quantized", "to 4 bits, symmetric, groups of 32")
    assert found[f"{at}.input_layernorm.weight"] == ("copied", "norm, router or other small part of a block")
    assert found["model.norm.weight"] == ("copied", "norm, or another part after the blocks")


def test_tensor_that_no_unit_has_is_refused_before_work(tmp_path):
    tiny_source(tmp_path / "source")
    plan, _ = build_plan(tiny_options(tmp_path, **RTN), 1)
    checkpoint = open_checkpoint(open_store(plan.source), plan.source)
    skeleton = load_skeleton(checkpoint.config, list(checkpoint.tensors))
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight of the source would be neither"):
        account(skeleton, checkpoint, plan.blocks, plan.units[:-1], {})
    with pytest.raises(
        UnsupportedModelError, match=r"model\.norm\.weight of the source would be written twice"
    ):
        account(skeleton, checkpoint, plan.blocks, plan.units, {"model.norm.weight": "twice"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A calibrated conversion whose biases were corrected, in each format."""
    root = tmp_path_factory.mktemp("finished")
    tiny_source(root / "source", attention_bias=True)
    tensors = read_all_tensors(root / "source")
    biases = {name: torch.randn_like(t) for name, t in tensors.items() if name.endswith(".bias")}
    for shard in (root / "source").glob("*.safetensors"):
        held = load_file(shard)
        save_file({**held, **{n: t for n, t in biases.items() if n in held}}, shard, {"format": "pt"})
    tiny_text(root / "calibration.jsonl", seed=1)
    for name in IN_SAFETENSORS:
        quantize(
            tiny_options(
                root, **held_options(name), output=str(root / name), evaluation=None, correct_biases=True
            )
        )
    return root


def tampered(finished, tmp_path, edit, output_format="compressed-tensors"):
    """Findings about a copy of a finished output, of which one shard was edited."""
    output = tmp_path / "output"
    shutil.copytree(finished / output_format, output)
    edit(output)
    return verify_checkpoint(open_store("file:///"), f"file://{output}", f"file://{finished}/source").findings


def edit_tensors(edit):
    """An edit of the shard that holds block 1."""

    def change(output: Path) -> None:
        for shard in sorted(output.glob("*.safetensors")):
            held = load_file(shard)
            if any(".layers.1." in name for name in held):
                edit(held)
                save_file(held, shard, {"format": "pt"})

    return change


@pytest.mark.parametrize("output_format", IN_SAFETENSORS)
def test_sound_output_is_accounted_for(finished, tmp_path, output_format):
    assert tampered(finished, tmp_path, lambda _: None, output_format) == ()


AT = "model.layers.1"


def _remove(name):
    return edit_tensors(lambda held: held.pop(name))


def _set(name, tensor):
    return edit_tensors(lambda held: held.update({name: tensor}))


def _flip(name):
    def edit(held):
        held[name].view(torch.uint8)[0] ^= 1

    return edit_tensors(edit)


def _report(edit):
    def change(output):
        path = output / "quantmill_report.json"
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))

    return change


def _forget_corrections(values):
    for block in values["blocks"]:
        for row in block["linears"]:
            row["bias_change"] = None


def _call_norms_dropped(values):
    for entry in values["tensors"]:
        if "model.norm.weight" in entry["names"]:
            entry["state"] = "dropped"


FAULTS = {
    "a copied tensor is gone": (
        _remove(f"{AT}.input_layernorm.weight"),
        f"Tensor {AT}.input_layernorm.weight of the source is neither kept, nor quantized, nor dropped",
    ),
    "a byte of a copied tensor": (
        _flip(f"{AT}.input_layernorm.weight"),
        f"Tensor {AT}.input_layernorm.weight is not as in the source: 1 of its 128 bytes differ.",
    ),
    "something more": (
        _set(f"{AT}.mlp.extra", torch.ones(2)),
        f"Tensor {AT}.mlp.extra is in the output and comes from nothing in the source.",
    ),
    "a packed tensor is gone": (
        _remove(f"{AT}.mlp.up_proj.weight_scale"),
        f"Tensor {AT}.mlp.up_proj.weight_scale is absent; BF16 [96, 2] was expected at 4 bits",
    ),
    "a packed tensor of another shape": (
        _set(f"{AT}.mlp.up_proj.weight_packed", torch.ones(96, 7, dtype=torch.int32)),
        f"Tensor {AT}.mlp.up_proj.weight_packed is I32 [96, 7]; I32 [96, 8] was expected",
    ),
    "a packed tensor too many": (
        _set(f"{AT}.mlp.up_proj.weight_zero_point", torch.ones(12, 2, dtype=torch.int32)),
        f"Tensor {AT}.mlp.up_proj.weight_zero_point is I32 [12, 2]; absent was expected",
    ),
    "the weight beside its packed tensors": (
        _set(f"{AT}.mlp.up_proj.weight", torch.ones(96, 64, dtype=torch.bfloat16)),
        f"Tensor {AT}.mlp.up_proj.weight is BF16 [96, 64]; absent was expected at 4 bits",
    ),
    "a bias that nobody says was corrected": (
        _report(_forget_corrections),
        f"Tensor {AT}.self_attn.q_proj.bias is not as in the source",
    ),
    "the report says another state": (
        _report(_call_norms_dropped),
        "Tensor model.norm.weight is copied, the report says dropped.",
    ),
    "dropped, and there": (
        _report(lambda values: values["dropped"].update({"model.norm.weight": "no reason"})),
        "Tensor model.norm.weight is in the output, though the report says that it was dropped.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_the_output_is_one_sentence(finished, tmp_path, fault):
    edit, said = FAULTS[fault]
    found = [finding for finding in tampered(finished, tmp_path, edit) if said in finding]
    assert found, tampered(finished, tmp_path / "again", edit)


@pytest.mark.parametrize("format_name", IN_SAFETENSORS)
def test_weight_beside_its_packed_tensors_is_found_in_every_format(tmp_path, format_name):
    plan, made, _ = converted(tmp_path, **held_options(format_name))
    output, name = Path(plan.output.removeprefix("file://")), f"{AT}.mlp.up_proj.weight"
    _set(name, torch.ones(96, 64, dtype=torch.bfloat16))(output)
    findings = verify_checkpoint(open_store("file:///"), plan.output, plan.source).findings
    # Some formats have codes of that name.
    wanted = "I8 [96, 64]" if name in made else "absent"
    assert any(f"Tensor {name} is BF16 [96, 64]; {wanted} was expected" in found for found in findings)


def test_verify_prints_the_table_and_exits_1_on_a_violation(finished, tmp_path, capsys):
    arguments = ["verify", str(finished / "gptq"), "--source", str(finished / "source")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "  quantized  21 " in shown and "to 4 bits, symmetric, groups of 32" in shown
    assert "  corrected  12 " in shown and "bias that makes up for what its linear lost" in shown
    assert main([*arguments, "--json"]) == 0
    states = {
        entry["state"]: entry["count"] for entry in json.loads(capsys.readouterr().out)["source_tensors"]
    }
    assert (states["quantized"], states["corrected"]) == (21, 12)
    output = tmp_path / "output"
    shutil.copytree(finished / "gptq", output)
    _flip(f"{AT}.input_layernorm.weight")(output)
    assert main(["verify", str(output), "--source", str(finished / "source")]) == 1
    assert "input_layernorm.weight is not as in the source" in capsys.readouterr().out
