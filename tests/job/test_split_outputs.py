"""Outputs whose linears were parts of fused or transposed tensors, verified and evaluated."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.checkpoint.verify import VerifyResult, verify_checkpoint
from quantlib.errors import CheckpointError
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.storage import open_store
from tests.support.tiny_jobs import save_letter_tokenizer, tiny_options, tiny_text
from tests.support.tiny_models import read_all_tensors, save_tiny_checkpoint

EXPERTS = {
    "gpt_oss": "model.layers.1.mlp.experts",
    "llama4_text": "model.layers.1.feed_forward.experts",
    "granitemoe": "model.layers.1.block_sparse_moe.experts",
}
FAMILIES = ("gpt2", *EXPERTS)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Family -> folder of a source and its output, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = root = tmp_path_factory.mktemp(family)
            save_tiny_checkpoint(root / "source", family)
            save_letter_tokenizer(root / "source")
            tiny_text(root / "evaluation.jsonl", seed=2)
            quantize(tiny_options(root, group_size=8, method="rtn", calibration=None))
        return made[family]

    return folder_of


def _verify(output: Path, source: Path) -> VerifyResult:
    return verify_checkpoint(open_store("file:///"), f"file://{output}", f"file://{source}")


def _tampered(root: Path, folder: Path, edit) -> set[str]:
    """What is said of tensors after the shard of block 1 was edited, without digest and index."""
    output = folder / "output"
    shutil.copytree(root / "output", output)
    for shard in sorted(output.glob("*.safetensors")):
        held = load_file(shard)
        if any(".1." in name.partition("experts")[0] for name in held):
            edit(held)
            save_file(held, shard, {"format": "pt"})
    findings = _verify(output, root / "source").findings
    return {finding for finding in findings if "sha256" not in finding and "index.json" not in finding}


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_output_is_accounted_for(finished, family):
    root = finished(family)
    result = _verify(root / "output", root / "source")
    assert result.findings == ()
    tensors, written = (read_all_tensors(root / name) for name in ("source", "output"))
    assert sum(account.count for account in result.accounts) == len(tensors)
    assert sum(account.size_bytes for account in result.accounts) == sum(t.nbytes for t in tensors.values())
    report = json.loads((root / "output" / "quantmill_report.json").read_text())
    assert [found["count"] for found in report["tensors"]] == [found.count for found in result.accounts]
    quantized = sum(account.count for account in result.accounts if account.state == "quantized")
    assert 0 < quantized <= len(tensors.keys() - written.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_of_the_output_is_that_of_the_run(finished, family):
    root = finished(family)
    told = json.loads((root / "output" / "quantmill_report.json").read_text())["evaluation"]
    for name, perplexity in (
        ("output", told["perplexity_quantized"]),
        ("source", told["perplexity_original"]),
    ):
        measured = evaluate_checkpoint(
            str(root / name),
            f"file://{root}/evaluation.jsonl",
            text_column="text",
            sequences=5,
            sequence_length=32,
            threads=1,
            device="cpu",
        )
        assert measured["digest"] == told["digest"]
        assert math.isclose(measured["perplexity"], perplexity, rel_tol=1e-5)
    assert not math.isclose(told["perplexity_quantized"], told["perplexity_original"], rel_tol=1e-5)


@pytest.mark.parametrize("family", EXPERTS)
def test_packed_tensor_of_an_expert_that_is_gone_is_found(finished, family, tmp_path):
    name = f"{EXPERTS[family]}.2.up_proj.weight_scale"
    (finding,) = _tampered(finished(family), tmp_path, lambda held: held.pop(name))
    # 48 rows and 4 groups of 8 columns.
    assert finding.startswith(f"Tensor {name} is absent; F32 [48, 4] was expected at 4 bits")


@pytest.mark.parametrize("family", EXPERTS)
def test_expert_that_is_gone_is_found(finished, family, tmp_path):
    gone = f"{EXPERTS[family]}.2."

    def remove(held):
        for name in [name for name in held if name.startswith(gone)]:
            del held[name]

    findings = _tampered(finished(family), tmp_path, remove)
    absent = {finding.split()[1].removeprefix(gone) for finding in findings if " is absent; " in finding}
    projections = ("gate_proj", "up_proj", "down_proj")
    parts = ["weight_packed", "weight_scale", "weight_shape", *(["bias"] if family == "gpt_oss" else [])]
    assert absent == {f"{projection}.{part}" for projection in projections for part in parts}
    assert len(findings) == len(absent)


def test_packed_tensor_of_the_shape_that_the_source_stores_is_found(finished, tmp_path):
    name = "transformer.h.1.mlp.c_fc.weight_scale"
    wrong = {name: torch.ones(32, 16)}
    (finding,) = _tampered(finished("gpt2"), tmp_path, lambda held: held.update(wrong))
    assert finding.startswith(f"Tensor {name} is F32 [32, 16]; F32 [128, 4] was expected")


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_changed_value_of_a_split_bias_is_found(finished, tmp_path, projection):
    name = f"{EXPERTS['gpt_oss']}.2.{projection}.bias"
    whole = "down_proj_bias" if projection == "down_proj" else "gate_up_proj_bias"

    def change(held):
        held[name][5] += 1e-3

    (finding,) = _tampered(finished("gpt_oss"), tmp_path, change)
    values = 32 if projection == "down_proj" else 48
    assert finding == (
        f"Tensor {name} is not as its part of {EXPERTS['gpt_oss']}.{whole} in the source:"
        f" 1 of its {values} values differ."
    )


def test_split_bias_of_another_dtype_is_found(finished, tmp_path):
    name = f"{EXPERTS['gpt_oss']}.2.up_proj.bias"
    findings = _tampered(
        finished("gpt_oss"), tmp_path, lambda held: held.update({name: held[name].bfloat16()})
    )
    assert findings == {
        f"Tensor {name} is BF16 [48]; F32 [48] was expected, a part of"
        f" {EXPERTS['gpt_oss']}.gate_up_proj_bias."
    }


@pytest.mark.parametrize("ending", ["4.up_proj.weight_packed", "2.up_proj.bias", "gate_up_proj_scale"])
def test_tensor_too_many_is_found(finished, tmp_path, ending):
    name = f"{EXPERTS['granitemoe']}.{ending}"
    extra = {name: torch.ones(48, dtype=torch.int32)}
    findings = _tampered(finished("granitemoe"), tmp_path, lambda held: held.update(extra))
    assert findings == {f"Tensor {name} is in the output and comes from nothing in the source."}


def test_fused_tensor_of_which_nothing_is_left_is_found(finished, tmp_path):
    def remove(held):
        for name in [name for name in held if name.endswith("_proj.bias") and ".experts." in name]:
            del held[name]

    findings = _tampered(finished("gpt_oss"), tmp_path, remove)
    assert findings == {
        f"Tensor {EXPERTS['gpt_oss']}.{name} of the source is neither kept, nor quantized, nor dropped with"
        " a reason."
        for name in ("gate_up_proj_bias", "down_proj_bias")
    }


def test_structure_that_is_not_known_is_said(finished, tmp_path):
    root = finished("granitemoe")
    shutil.copytree(root / "source", tmp_path / "source")
    config = json.loads((root / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    findings = _verify(root / "output", tmp_path / "source").findings
    assert any("cannot be told: model_type 'unheard_of' is not one" in finding for finding in findings)


def test_source_of_another_shape_than_its_config_says_is_found(finished, tmp_path):
    root = finished("gpt_oss")
    shutil.copytree(root / "source", tmp_path / "source")
    config = json.loads((root / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "intermediate_size": 56}))
    findings = _verify(root / "output", tmp_path / "source").findings
    name = f"{EXPERTS['gpt_oss']}.gate_up_proj_bias"
    assert f"Tensor {name} of the source is [4, 96], by config.json [4, 112]." in findings


@pytest.mark.parametrize("family", EXPERTS)
def test_evaluation_refuses_an_output_that_lacks_a_linear_of_an_expert(finished, family, tmp_path):
    root = finished(family)
    output, gone = tmp_path / "output", f"{EXPERTS[family]}.2.up_proj"
    shutil.copytree(root / "output", output)
    index = output / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {n: s for n, s in values["weight_map"].items() if not n.startswith(f"{gone}.")}
    index.write_text(json.dumps(values))
    for shard in output.glob("*.safetensors"):
        held = load_file(shard)
        kept = {name: tensor for name, tensor in held.items() if not name.startswith(f"{gone}.")}
        save_file(kept, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{gone}\.weight"):
        evaluate_checkpoint(
            str(output),
            f"file://{root}/evaluation.jsonl",
            text_column="text",
            sequences=5,
            sequence_length=32,
            threads=1,
            device="cpu",
        )
