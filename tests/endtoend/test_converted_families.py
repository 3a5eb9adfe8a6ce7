"""Whole conversions of tiny models of every family, beside transformers' own forward on what was written.

The output is read by a decoder that shares no code with the product's packers
(`tests/benchmarks/checkpoint_levels.py`), put back into the layout of the source and run by transformers. The
product's own verification and evaluation have to agree.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantlib.calibration.corpus import load_tokenizer, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.checkpoint.index import open_checkpoint
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.job.options import JobOptions
from quantlib.job.plan import Plan
from quantlib.job.planner import build_plan
from quantlib.storage import open_store
from tests.benchmarks.checkpoint_levels import read_levels
from tests.support.family_settings import CONVERTED, DENSE, EXPERTS, MULTIMODAL
from tests.support.tiny_jobs import save_letter_tokenizer, tiny_options, tiny_text
from tests.support.tiny_models import auto_class, read_all_tensors, read_config, save_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

_README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=300)
    return folder


def _options(folder: Path, texts: Path, name: str, **overrides: Any) -> JobOptions:
    given = {
        "source": str(folder / "source"),
        "output": str(folder / name),
        "calibration": str(texts / "calibration.jsonl"),
        "evaluation": str(texts / "evaluation.jsonl"),
        "group_size": 8,
        "sequences": 96,
        "sequence_length": 32,
        "evaluation_sequences": 32,
        "checkpoint_every": 0,
    }
    return tiny_options(folder, **{**given, **overrides})


def _rows(options: JobOptions) -> torch.Tensor:
    store = open_store(f"file://{options.source}", "obstore")
    tokenizer = load_tokenizer(store, open_checkpoint(store, f"file://{options.source}"))
    documents = read_documents(f"file://{options.evaluation}", "text")
    return token_rows(documents, tokenizer, num_sequences=32, sequence_length=32, seed=0)


def _perplexity(folder: Path, ids_BT: torch.Tensor) -> float:
    """Of transformers' own model, in fp32."""
    model = auto_class(read_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits_BTV = model(input_ids=ids_BT.long(), use_cache=False).logits[:, :-1].double()
    picked = logits_BTV.log_softmax(-1).gather(2, ids_BT[:, 1:, None].long())
    return math.exp(-picked.mean().item())


def _write_levels(source: Path, output: Path, plan: Plan, folder: Path) -> None:
    """A plain checkpoint in the layout of the source, with the levels that a quantized one stands for."""
    levels, stored = read_levels(output), read_all_tensors(source)
    replaced = {name: tensor.clone() for name, tensor in stored.items()}
    for linear in (linear for block in plan.blocks for linear in block.linears if linear.scheme is not None):
        linear.weight.of(replaced).copy_(levels.pop(f"{linear.name}.weight"))
        if linear.split_bias is not None:
            assert torch.equal(linear.split_bias.of(stored), levels.pop(f"{linear.name}.bias"))
    for name, tensor in levels.items():
        assert torch.equal(stored[name].float(), tensor), name
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(replaced, folder / "model.safetensors", metadata={"format": "pt"})


def _assert_accounted_for(stored: dict[str, torch.Tensor], written: dict[str, Any], plan: Plan) -> None:
    linears = [linear for block in plan.blocks for linear in block.linears if linear.scheme is not None]
    taken = {linear.weight.tensor for linear in linears}
    taken |= {linear.split_bias.tensor for linear in linears if linear.split_bias is not None}
    packed = {f"{linear.name}.{part}" for linear in linears for part in ("weight_packed", "weight_scale")}
    assert packed <= written.keys()
    # What is not a part of a quantized linear is there as it was; nothing was left out.
    assert {name for name in stored if name not in written} == taken
    assert not plan.dropped
    for name in stored.keys() & written.keys():
        assert torch.equal(stored[name], written[name]), name


def _assert_verified_and_evaluated(options: JobOptions, figures: dict[str, Any]) -> None:
    store = open_store("file:///", "obstore")
    assert verify_checkpoint(store, f"file://{options.output}", f"file://{options.source}").findings == ()
    measured = evaluate_checkpoint(
        options.output,
        f"file://{options.evaluation}",
        text_column="text",
        sequences=options.evaluation_sequences,
        sequence_length=options.sequence_length,
        threads=1,
        device="cpu",
    )
    assert measured["digest"] == figures["digest"]
    assert measured["perplexity"] == pytest.approx(figures["perplexity_quantized"], rel=1e-5)


@pytest.mark.parametrize("family", CONVERTED)
def test_family_is_converted(family: str, tmp_path: Path, texts: Path) -> None:
    source = save_tiny_checkpoint(tmp_path / "source", family)
    assert len(list(source.glob("*.safetensors"))) > 1
    save_letter_tokenizer(source)
    options = {
        "W8 RTN": _options(tmp_path, texts, "W8 RTN", scheme="W8A16", method="rtn"),
        "W4 GPTQ": _options(tmp_path, texts, "W4 GPTQ"),
    }
    plan, _ = build_plan(options["W8 RTN"], 1)
    # One linear with GPTQ, so that the errors of those that are rounded are weighed by the same Hessians.
    rule = {"match": plan.blocks[-1].linears[-1].name, "method": "gptq"}
    options["W4 RTN"] = _options(tmp_path, texts, "W4 RTN", method="rtn", rules=[rule])
    reports = {name: quantize(its) for name, its in options.items()}
    ids_BT, figures = _rows(options["W8 RTN"]), reports["W8 RTN"]["evaluation"]
    _assert_accounted_for(read_all_tensors(source), read_all_tensors(tmp_path / "W8 RTN"), plan)
    _write_levels(source, tmp_path / "W8 RTN", plan, tmp_path / "levels")
    assert figures["perplexity_original"] == pytest.approx(_perplexity(source, ids_BT), rel=1e-5)
    assert figures["perplexity_quantized"] == pytest.approx(
        _perplexity(tmp_path / "levels", ids_BT), rel=1e-5
    )
    assert figures["perplexity_quantized"] != figures["perplexity_original"]
    _assert_verified_and_evaluated(options["W8 RTN"], figures)
    errors = {
        name: sum(linear["relative_error"] for block in report["blocks"] for linear in block["linears"])
        for name, report in reports.items()
    }
    assert errors["W4 GPTQ"] < errors["W4 RTN"]
    assert not reports["W4 GPTQ"]["calibration"]["excluded_rows"]
    kept = json.loads((tmp_path / "W4 GPTQ" / "config.json").read_text())["quantization_config"]["ignore"]
    routers = [name for name in kept if re.search(r"(gate|router|gate\.wg|shared_expert_gate)$", name)]
    assert all(f"{name}.weight" in read_all_tensors(source) for name in routers)


def test_readme_lists_the_families() -> None:
    kinds = {"dense": DENSE, "mixture of experts": EXPERTS, "text tower": MULTIMODAL}
    for kind, settings in kinds.items():
        families = sorted(family for family in CONVERTED if family in settings)
        assert f"| {kind} ({len(families)}) | {', '.join(families)} |" in _README.read_text()
