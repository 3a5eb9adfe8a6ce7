"""One request, several layouts: the codes are solved once, and each output is what it would be by itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.__main__ import main
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import RecipeError
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize, quantize_all
from quantlib.job.options import JobOptions
from quantlib.job.several_formats import SCALE_DTYPES, requests_of_formats
from quantlib.job.stages import Progress
from quantlib.packing import FORMATS, format_of
from quantlib.quantized import QuantizedLinear
from quantlib.storage import open_store
from tests.support.thread_cluster import ThreadCluster, convert_all_on, convert_in_least_store
from tests.support.tiny_jobs import (
    gguf_source,
    shard_digests,
    tiny_options,
    tiny_source,
    tiny_text,
    wide_source,
)
from tests.support.tiny_models import read_all_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

_ALL = "compressed-tensors, gptq,awq"
# At 3 bits the activations are by default those of the quantized blocks.
_CASES: dict[str, dict[str, Any]] = {
    "symmetric": {"format": _ALL},
    "asymmetric": {"format": "gptq,compressed-tensors,awq", "scheme": "W4A16_ASYM", "refit_scales": True},
    "quantized": {"format": "compressed-tensors,gptq", "scheme": "W3A16"},
    "rounded": {
        "format": "gptq,compressed-tensors",
        "scheme": "W8A16",
        "method": "rtn",
        "calibration": None,
        "evaluation": None,
    },
    "experts": {
        "format": "awq,compressed-tensors",
        "source": "experts",
        "calibration_routing": "all-experts",
    },
    "rows": {"format": "bitsandbytes,compressed-tensors,gptq", "scheme": "W8A16", "group_size": -1},
    "outliers": {"format": "gptq,compressed-tensors", "outlier_columns": 3},
    "weights": {"format": "gptq,compressed-tensors", "outlier_weights": 30},
    "gguf": {"format": "gguf,compressed-tensors", "group_size": 32, "source": "lettered"},
    "biases": {"format": _ALL, "source": "biased", "correct_biases": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    tiny_source(folder / "source")
    tiny_source(folder / "experts", "glm4_moe", num_hidden_layers=2, moe_intermediate_size=64)
    gguf_source(folder / "lettered", num_hidden_layers=2)
    tiny_source(folder / "biased", num_hidden_layers=2, attention_bias=True)
    wide_source(folder / "wide")
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=300)
    return folder


def _options(root: Path, folder: str, case: str, **given: Any) -> JobOptions:
    values = {"sequences": 40, "output": str(root / folder), "source": "source", **_CASES[case], **given}
    return tiny_options(root, **{**values, "source": str(root / values["source"])})


def _requests(root: Path, folder: str, case: str, **given: Any) -> tuple[JobOptions, ...]:
    return requests_of_formats(_options(root, folder, case, **given))


@pytest.fixture(scope="module")
def alone(root):
    """Case -> format -> the report of a conversion by itself with portable scales, and its shards."""
    made: dict[str, dict[str, tuple[dict[str, Any], dict[str, str]]]] = {}

    def of(case: str) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
        if case not in made:
            made[case] = {}
            for options in _requests(root, f"alone {case}", case):
                report = quantize(options)
                assert options.portable_scales and options.format is not None
                made[case][options.format] = (report, shard_digests(Path(options.output)))
        return made[case]

    return of


def _linears(output: Path) -> dict[str, QuantizedLinear]:
    config = json.loads((output / "config.json").read_text())
    packer, tensors = format_of(config), read_all_tensors(output)
    assert packer is not None
    # The one tensor of a linear that each layout has.
    names = [name.rpartition(".")[0] for name in tensors if name.endswith((".qweight", ".weight_packed"))]
    schemes = {name: packer.scheme_of(config["quantization_config"], name) for name in names}
    return {name: packer.unpack(name, tensors, scheme) for name, scheme in schemes.items() if scheme}


def _solves(reports: list[dict[str, Any]]) -> int:
    return sum(report["own_stages"].get("solve", {"calls": 0})["calls"] for report in reports)


@pytest.mark.parametrize("case", _CASES)
def test_outputs_are_those_of_conversions_by_themselves_from_one_solve(root, alone, case):
    requests = _requests(root, f"together {case}", case)
    reports = quantize_all(requests)
    single = alone(case)
    for options, report in zip(requests, reports, strict=True):
        assert options.format is not None
        own, digests = single[options.format]
        assert shard_digests(Path(options.output)) == digests
        assert report["identity"] == own["identity"]
        assert report["evaluation"] == own["evaluation"]
        assert report["blocks"] and [block["linears"] for block in report["blocks"]] == [
            block["linears"] for block in own["blocks"]
        ]
        others = [other.format for other in requests if other is not options]
        assert [Path(uri).name for uri in report["packed_with"]] == others
    # As many as one of them needs; by themselves units without data are converted whole.
    if reports[0]["evaluation"]:
        assert _solves(reports) == next(iter(single.values()))[0]["stages"]["solve"]["calls"]
    assert _solves(reports) == reports[0]["stages"]["solve"]["calls"] > 0


@pytest.mark.parametrize("case", ["symmetric", "asymmetric", "quantized", "rounded", "experts"])
def test_codes_scales_and_zeros_are_equal_in_all_layouts(root, alone, case):
    alone(case)
    found = {name: _linears(root / f"alone {case}" / name) for name in alone(case)}
    first, *others = found.values()
    assert len(first) > 8
    for other in others:
        assert first.keys() == other.keys()
        for name, linear in first.items():
            assert torch.equal(linear.codes_RC, other[name].codes_RC)
            assert torch.equal(linear.scale_RG.float(), other[name].scale_RG.float())
            if linear.zero_RG is not None:
                assert torch.equal(linear.zero_RG, other[name].zero_RG)
    dtypes = {name: {linear.scale_RG.dtype for linear in linears.values()} for name, linears in found.items()}
    assert dtypes.pop("compressed-tensors") == {torch.bfloat16}
    assert all(found == {torch.float16} for found in dtypes.values())


def test_each_output_verifies_and_evaluates_alike(root, alone):
    for name, (report, _) in alone("symmetric").items():
        output = root / "alone symmetric" / name
        verified = verify_checkpoint(
            open_store(f"file://{output}"), f"file://{output}", source_uri=f"file://{root / 'source'}"
        )
        assert not verified.findings
        found = evaluate_checkpoint(
            str(output),
            str(root / "evaluation.jsonl"),
            text_column=None,
            sequences=5,
            sequence_length=32,
            threads=1,
        )
        assert found["perplexity"] == pytest.approx(report["evaluation"]["perplexity_quantized"], rel=1e-6)
    figures = [report["evaluation"] for report, _ in alone("symmetric").values()]
    assert figures[0] == figures[1] == figures[2]


def test_layouts_with_scales_of_one_dtype_have_the_bytes_of_plain_conversions(root):
    requests = _requests(root, "gptq and awq", "symmetric", format="gptq,awq", evaluation=None)
    reports = quantize_all(requests)
    for options in requests:
        plain = _options(root, f"plain {options.format}", "symmetric", format=options.format, evaluation=None)
        assert not plain.portable_scales
        quantize(plain)
        assert shard_digests(Path(plain.output)) == shard_digests(Path(options.output))
    assert _solves(reports) == reports[0]["own_stages"]["solve"]["calls"]


def test_dtype_of_plain_scales_is_known_of_every_layout():
    assert SCALE_DTYPES.keys() == FORMATS.keys()
    for name, packer in FORMATS.items():
        for dtype in (torch.bfloat16, torch.float16):
            stored = SCALE_DTYPES[name]
            assert packer.scale_dtype(dtype) == (dtype if stored is None else getattr(torch, stored))


class _StopError(Exception):
    pass


def _interrupt(requests: tuple[JobOptions, ...], label: str) -> None:
    def stop(progress: Progress) -> None:
        if progress.label == label:
            raise _StopError

    with pytest.raises(_StopError):
        quantize_all(requests, stop)


@pytest.mark.parametrize("case", ["symmetric", "quantized"])
@pytest.mark.parametrize("first", ["compressed-tensors", "gptq"])
def test_what_was_interrupted_is_finished_together_or_one_after_the_other(root, alone, case, first):
    folder = f"resumed {case} {first}"
    requests = _requests(root, folder, case, checkpoint_every=1)
    _interrupt(requests, "block 3/3: capture")
    quantize(next(options for options in requests if options.format == first))
    reports = quantize_all(requests)
    assert all(len(report["history"]["reused_units"]) == 3 for report in reports)
    for name, (_, digests) in alone(case).items():
        assert shard_digests(root / folder / name) == digests


@pytest.mark.parametrize("case", ["symmetric", "quantized"])
@pytest.mark.parametrize("damaged", ["compressed-tensors", "gptq"])
def test_block_that_one_output_lacks_is_solved_for_it_alone(root, alone, case, damaged):
    folder = f"damaged {case} {damaged}"
    requests = _requests(root, folder, case, checkpoint_every=0)
    _interrupt(requests, "head")
    (root / folder / damaged / "model-00003-of-00005.safetensors").unlink()
    reports = {Path(report["output"]).name: report for report in quantize_all(requests)}
    assert {name for name, report in reports.items() if report["history"]["redone_units"]} == {damaged}
    assert {name for name, report in reports.items() if "solve" in report["own_stages"]} == {damaged}
    for name, (report, digests) in alone(case).items():
        assert shard_digests(root / folder / name) == digests
        assert reports[name]["evaluation"] == report["evaluation"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["symmetric", "quantized", "experts"])
def test_workers_and_slices_change_no_byte(root, alone, case):
    convert_all_on(ThreadCluster(3), _requests(root, f"three {case}", case))
    convert_in_least_store(_requests(root, f"sliced {case}", case))
    for name, (_, digests) in alone(case).items():
        assert shard_digests(root / f"three {case}" / name) == digests
        assert shard_digests(root / f"sliced {case}" / name) == digests


@pytest.mark.slow
@pytest.mark.parametrize("case", ["symmetric", "quantized"])
@pytest.mark.parametrize("method", ["observe", "solve", "advance", "write"])
def test_worker_lost_changes_no_byte(root, alone, case, method):
    cluster = ThreadCluster(3)
    cluster.kill_at(method, 3)
    requests = _requests(root, f"lost {case} {method}", case)
    reports = convert_all_on(cluster, requests)
    assert len(reports[0]["history"]["renewals"]) == 1
    for options, report in zip(requests, reports, strict=True):
        assert options.format is not None
        own, digests = alone(case)[options.format]
        assert shard_digests(Path(options.output)) == digests
        assert report["evaluation"] == own["evaluation"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "solve_tile", "pack"])
def test_tiles_are_packed_for_all_wherever_they_were_solved(root, method):
    given = {"source": "wide", "sequences": 150, "rules": [{"match": "*.down_proj", "keep": True}]}
    requests = _requests(root, f"tiles {method}", "symmetric", format="gptq,compressed-tensors", **given)
    cluster = ThreadCluster(2)
    if method is not None:
        cluster.kill_at(method, 1)
    convert_all_on(cluster, requests)
    for options in requests:
        single = _options(
            root, f"tiles {method} {options.format}", "symmetric", **given, format=options.format
        )
        quantize(dataclasses.replace(single, portable_scales=True))
        assert shard_digests(Path(single.output)) == shard_digests(Path(options.output))


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_layout_that_cannot_hold_the_scheme_is_refused_and_the_others_are_named(
    root, tmp_path, capsys, command
):
    line = [command, str(root / "source"), str(tmp_path / "out"), "--scheme", "W3A16", "--group-size", "32"]
    line += ["--sequence-length", "32"]
    line += ["--format", _ALL, "--calibration", str(root / "calibration.jsonl"), "--runner", "inprocess"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "1 of 3 outputs cannot be made: awq (" in said
    assert "codes of 4 bits, not 3" in said
    assert "without it compressed-tensors, gptq can be made" in said
    assert not list(tmp_path.iterdir())


def test_quantized_activations_of_several_sets_of_codes_are_refused(root, tmp_path):
    """Recipes name no portable scales: bf16 and fp16 scales are rounded to other values."""
    requests = [
        _options(root, str(tmp_path / name), "quantized", format=name)
        for name in ("compressed-tensors", "gptq")
    ]
    with pytest.raises(RecipeError, match="gptq would have other codes than compressed-tensors"):
        quantize_all(requests)
    assert not list(tmp_path.iterdir())


def test_command_makes_an_output_for_each_format(root, tmp_path, capsys):
    recipe = tmp_path / "both.toml"
    recipe.write_text('format = "compressed-tensors,gptq"\ngroup_size = 32\nsequences = 8\n')
    line = [str(root / "source"), str(tmp_path / "out"), f"--recipe={recipe}", "--sequence-length", "32"]
    line += ["--calibration", str(root / "calibration.jsonl"), "--threads-per-worker", "1"]
    line += ["--runner", "inprocess", "--work", str(tmp_path / "work")]
    assert main(["plan", *line]) == 0
    planned = capsys.readouterr().out
    assert "of the same codes as gptq, which are solved once" in planned
    assert "of the same codes as compressed-tensors, which are solved once" in planned
    assert main(["quantize", *line, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [Path(report["output"]).name for report in reports] == ["compressed-tensors", "gptq"]
    for name in ("compressed-tensors", "gptq"):
        assert (tmp_path / "out" / name / "config.json").exists()
        assert (tmp_path / "work" / name / "plan.json").exists()
    page = (tmp_path / "out" / "gptq" / "quantmill_report.html").read_text()
    assert "Has the codes of compressed-tensors, which were solved once" in page
