"""Whole jobs that round embedding and head to Q8_0: their bytes, what is reported, and who may ask for it."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import RecipeError
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize, quantize_all
from quantlib.job.memory_needs import head_needs, prelude_needs
from quantlib.job.plan import plan_from_json, plan_to_json
from quantlib.job.planner import build_plan
from quantlib.storage import open_store
from tests.support.tiny_jobs import gguf_source, tiny_options, tiny_text

STORE = open_store("file:///")
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("embeddings")
    for number, text in enumerate(("calibration", "evaluation"), start=1):
        tiny_text(root / f"{text}.jsonl", seed=number)
    for name, settings in SOURCES.items():
        gguf_source(root / name, **settings)
    return root


SOURCES = {"untied": {}, "tied": {"tie_word_embeddings": True}, "unlearnt": {}}


def options_of(root: Path, source: str, output: str, **changes):
    values = {"format": "gguf", "embeddings": "q8_0", "output": str(root / output), **changes}
    return tiny_options(root, source=str(root / source), **values)


def tensors_of(folder: str | Path) -> dict:
    return {t.name: t for path in sorted(Path(folder).glob("*.gguf")) for t in gguf.GGUFReader(path).tensors}


def findings_of(options) -> tuple[str, ...]:
    return verify_checkpoint(STORE, f"file://{options.output}", f"file://{options.source}").findings


def source_tensor(options, name: str) -> np.ndarray:
    checkpoint = open_source(STORE, f"file://{options.source}")
    return read_tensors(STORE, checkpoint, [name])[name].float().numpy()


def measured(options) -> float:
    return evaluate_checkpoint(
        options.output,
        options.evaluation,
        text_column="text",
        sequences=5,
        sequence_length=32,
        threads=1,
        device="cpu",
    )["perplexity"]


@pytest.mark.parametrize("source", ["untied", "tied"])
def test_ends_have_the_bytes_of_the_gguf_package_and_the_report_counts_what_they_cost(root, source):
    options = options_of(root, source, f"{source}-output")
    report = quantize(options)
    assert findings_of(options) == ()
    found = tensors_of(options.output)
    ends = {"token_embd.weight": "model.embed_tokens.weight"}
    if source == "untied":
        ends["output.weight"] = "lm_head.weight"
    assert "output.weight" in found or source == "tied"
    for name, theirs in ends.items():
        assert found[name].tensor_type == Q8_0
        assert np.array_equal(found[name].data, gguf.quants.quantize(source_tensor(options, theirs), Q8_0))
    assert measured(options) == pytest.approx(report["evaluation"]["perplexity_quantized"], rel=1e-6)
    accounts = {name: entry for entry in report["tensors"] for name in entry["names"]}
    for theirs in ends.values():
        assert accounts[theirs]["state"] == "quantized"
        assert accounts[theirs]["reason"] == "embedding or head, to 8 bits, symmetric, groups of 32"
    config = json.loads((Path(options.output) / "config.json").read_text())["quantization_config"]
    named = {name: kind for name, kind in config["exceptions"].items() if "layers" not in name}
    assert named == {theirs.removesuffix(".weight"): "Q8_0" for theirs in ends.values()}


def test_figures_are_those_of_rounded_ends_alone_where_blocks_are_nearly_exact(root):
    kept, rounded = (
        quantize(options_of(root, "untied", f"exact-{how}", embeddings=how, scheme="W8A16"))["evaluation"]
        for how in ("keep", "q8_0")
    )
    assert kept["perplexity_original"] == pytest.approx(rounded["perplexity_original"], rel=1e-7)
    assert kept["perplexity_quantized"] != rounded["perplexity_quantized"]
    assert rounded["kl_divergence"] > 1.2 * kept["kl_divergence"]


def test_blocks_are_solved_alike_whatever_the_ends_are(root):
    both = [options_of(root, "untied", f"apart-{how}", embeddings=how) for how in ("keep", "q8_0")]
    for options in both:
        quantize(options)
    kept, rounded = (tensors_of(options.output) for options in both)
    for name, tensor in kept.items():
        if name not in ("token_embd.weight", "output.weight"):
            assert np.array_equal(tensor.data, rounded[name].data), name


def test_outputs_that_round_ends_and_others_come_from_one_reading(root):
    alone = [options_of(root, "untied", f"alone-{how}", embeddings=how) for how in ("q8_0", "keep")]
    together = [options_of(root, "untied", f"together-{how}", embeddings=how) for how in ("q8_0", "keep")]
    expected = [quantize(options) for options in alone]
    for report, other in zip(quantize_all(together), expected, strict=True):
        assert report["shards"] == other["shards"]
        assert report["evaluation"] == other["evaluation"]


def test_activations_that_calibrate_begin_with_the_levels_where_they_are_quantized(root):
    changes = {"propagation": "quantized", "correct_targets": True, "evaluation_sequences": 3}
    options = options_of(root, "untied", "propagated", **changes)
    report = quantize(options)
    assert findings_of(options) == ()
    kept = options_of(root, "untied", "propagated-kept", embeddings="keep", **changes)
    quantize(kept)
    name = "blk.0.attn_q.weight"
    assert not np.array_equal(tensors_of(options.output)[name].data, tensors_of(kept.output)[name].data)
    assert report["evaluation"]["perplexity_quantized"] > 0
    pair = [options_of(root, "untied", f"pair-{how}", embeddings=how, **changes) for how in ("q8_0", "keep")]
    with pytest.raises(RecipeError, match="several recipes need propagation original"):
        quantize_all(pair)


def test_rounding_without_data_streams_the_same_bytes(root):
    solved = options_of(root, "untied", "with-data", method="rtn")
    streamed = options_of(root, "untied", "without-data", method="rtn", calibration=None, evaluation=None)
    reports = [quantize(options) for options in (solved, streamed)]
    assert [s["sha256"] for s in reports[0]["shards"]] == [s["sha256"] for s in reports[1]["shards"]]


def test_the_plan_has_the_sizes_of_the_blocks_and_survives_its_storage(root):
    plan, _ = build_plan(options_of(root, "untied", "planned"), threads=1)
    first = {spec.name: spec for spec in plan.units[0].tensors}["model.embed_tokens.weight_blocks"]
    assert (first.dtype, first.shape) == ("U8", (96, 64 // 32 * 34))
    restored = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    assert (restored.units, restored.identity()) == (plan.units, plan.identity())
    kept, _ = build_plan(options_of(root, "untied", "planned", embeddings="keep"), threads=1)
    assert plan.identity() != kept.identity()
    # Original and levels are both there while cells are embedded and scored.
    assert prelude_needs(plan).live == 2 * prelude_needs(kept).live
    assert head_needs(plan).live == 2 * head_needs(kept).live - 4 * 64


def test_rows_of_zeros_are_no_fault(root):
    options = options_of(root, "unlearnt", "zeros", method="rtn", calibration=None, evaluation=None)
    _zero_row(Path(options.source))
    quantize(options)
    assert not tensors_of(options.output)["token_embd.weight"].data[7].any()
    assert findings_of(options) == ()


def _zero_row(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name][7] = 0
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["compressed-tensors", "gguf,compressed-tensors"])
def test_other_layouts_are_refused(root, layout):
    with pytest.raises(RecipeError, match=r"embeddings q8_0 is a kind of block .* names compressed-tensors"):
        options_of(root, "untied", "other", format=layout)
