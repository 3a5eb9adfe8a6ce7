"""Outputs that keep columns beside the codes: written, verified, evaluated, read again, interrupted."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import CheckpointError, RecipeError
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.job.bundle import bundle_of
from quantlib.job.estimate import describe_plan, format_plan
from quantlib.job.memory import Budgets, Surroundings, plan_memory
from quantlib.job.options import options_from
from quantlib.job.planner import build_plan
from quantlib.packing import FORMATS
from quantlib.storage import open_store
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text
from tests.support.tiny_models import read_all_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = 5
# Rounded without data, and not at all.
_RULES = ({"match": "*.o_proj", "method": "rtn"}, {"match": "*.1.mlp.*", "keep": True})
_RECIPES = {
    "compressed-tensors": {"rules": _RULES},
    "gptq": {"format": "gptq", "scheme": "W4A16_ASYM"},
    "awq": {"format": "awq"},
    "quantized": {"scheme": "W3A16", "propagation": "quantized"},
    "mixtral": {"source": "mixtral"},
    "NVFP4A16": {"scheme": "NVFP4A16", "group_size": None},
    "FP8A16_BLOCK": {"scheme": "FP8A16_BLOCK", "group_size": None},
    "bitsandbytes": {
        "format": "bitsandbytes",
        "scheme": "NF4_DQ",
        "group_size": None,
        "rules": ({"match": "*.down_proj", "keep": True},),
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Recipe -> folder with its output; the sources are beside it."""
    root = tmp_path_factory.mktemp("outliers")
    tiny_source(root / "source")
    tiny_source(root / "mixtral", "mixtral")
    for seed, name in enumerate(("calibration", "evaluation"), start=1):
        tiny_text(root / f"{name}.jsonl", seed=seed)
    made: dict[str, Path] = {}

    def folder_of(recipe: str) -> Path:
        if recipe not in made:
            quantize(_options(root, recipe))
            made[recipe] = root / recipe / "output"
        return made[recipe]

    return folder_of


def _options(root: Path, recipe: str, **changes):
    given = {"outlier_columns": KEPT, **_RECIPES[recipe]}
    source = str(root / given.pop("source", "source"))
    return tiny_options(
        root, **{**given, "source": source, "output": str(root / recipe / "output"), **changes}
    )


def _source_of(output: Path) -> Path:
    return Path(json.loads((output / "quantmill_report.json").read_text())["source"].removeprefix("file://"))


def _findings(output: Path, source: Path) -> tuple[str, ...]:
    return verify_checkpoint(open_store("file:///"), f"file://{output}", f"file://{source}").findings


@pytest.mark.parametrize("recipe", _RECIPES)
def test_output_is_accounted_for_and_evaluates_as_it_was_measured(finished, recipe):
    output = finished(recipe)
    assert _findings(output, _source_of(output)) == ()
    measured = evaluate_checkpoint(
        str(output),
        f"file://{output.parents[1]}/evaluation.jsonl",
        text_column="text",
        sequences=5,
        sequence_length=32,
        threads=1,
        device="cpu",
    )
    told = json.loads((output / "quantmill_report.json").read_text())["evaluation"]["perplexity_quantized"]
    assert math.isclose(measured["perplexity"], told, rel_tol=1e-5)


@pytest.mark.parametrize("recipe", _RECIPES)
def test_every_linear_of_gptq_keeps_as_many_columns_and_reads_as_them(finished, recipe):
    output = finished(recipe)
    written, original = read_all_tensors(output), read_all_tensors(_source_of(output))
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    packer, store = FORMATS[quantization["quant_method"]], open_store("file:///")
    source = open_source(store, f"file://{output}", levels_dtype="F32")
    kept = {name.removesuffix(".outlier_columns") for name in written if name.endswith(".outlier_columns")}
    without = {name.removesuffix(".weight") for name in source.decoded} - kept
    assert without == {name for name in without if name.endswith("o_proj") and recipe == "compressed-tensors"}
    assert quantization["outliers"] == {"columns": KEPT, "except": sorted(without)}
    assert len(kept) > 10
    for name in kept:
        columns, weight = written[f"{name}.outlier_columns"], written[f"{name}.outlier_weight"]
        assert (columns.dtype, weight.dtype) == (torch.int32, torch.bfloat16)
        assert columns.tolist() == sorted(set(columns.tolist())) and len(columns) == KEPT
        # The layout's own codes, as a reader sees them who knows nothing else.
        plain_RC = packer.unpack(name, written, packer.scheme_of(quantization, name)).dequantize()
        level_RC = read_tensors(store, source, [f"{name}.weight"])[f"{name}.weight"]
        assert torch.equal(level_RC[:, columns.long()], weight.float())
        others = torch.ones(level_RC.shape[1], dtype=torch.bool)
        others[columns.long()] = False
        assert torch.equal(level_RC[:, others], plain_RC[:, others])
        if f"{name}.weight" in original:
            gap, plain_gap = ((x - original[f"{name}.weight"].float()).norm() for x in (level_RC, plain_RC))
            assert gap < plain_gap < 2 * gap


def test_columns_kept_bring_the_output_nearer_to_the_source(finished, tmp_path):
    kept = json.loads((finished("quantized") / "quantmill_report.json").read_text())
    root = finished("quantized").parents[1]
    plain = quantize(_options(root, "quantized", outlier_columns=0, output=str(tmp_path / "plain")))
    errors, plain_errors = (
        [row["relative_error"] for block in report["blocks"] for row in block["linears"]]
        for report in (kept, plain)
    )
    assert sum(errors) < 0.9 * sum(plain_errors)


def _interrupted(options, label: str) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(progress) -> None:
        if progress.label == label:
            raise Stop

    with pytest.raises(Stop):
        quantize(options, stop)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quantized", "mixtral"])
def test_workers_and_interruptions_change_no_byte(finished, recipe):
    output = finished(recipe)
    wanted, root = shard_digests(output), output.parents[1]
    options = _options(root, recipe, output=f"{output}-resumed", checkpoint_every=0)
    _interrupted(options, "block 3/3: capture")
    quantize(options)
    assert shard_digests(Path(f"{output}-resumed")) == wanted
    cluster = ThreadCluster(3)
    cluster.kill_at("solve", 4)
    convert_on(cluster, _options(root, recipe, output=f"{output}-three"))
    assert shard_digests(Path(f"{output}-three")) == wanted


def _tampered(output: Path, folder: Path, edit) -> Path:
    copy = folder / "output"
    shutil.copytree(output, copy)
    for shard in sorted(copy.glob("*.safetensors")):
        held = load_file(shard)
        if any(name.endswith("0.mlp.up_proj.outlier_columns") for name in held):
            edit(held)
            save_file(held, shard, {"format": "pt"})
    return copy


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("ending", ["outlier_columns", "outlier_weight"])
def test_tensor_of_kept_columns_that_is_gone_is_found(finished, tmp_path, ending):
    output = finished("compressed-tensors")
    copy = _tampered(output, tmp_path, lambda held: held.pop(f"{UP}.{ending}"))
    found = [x for x in _findings(copy, _source_of(output)) if f"Tensor {UP}.{ending} is absent" in x]
    assert len(found) == 1


def test_kept_columns_where_the_config_names_none_are_found(finished, tmp_path):
    output = finished("compressed-tensors")
    copy = tmp_path / "output"
    shutil.copytree(output, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["outliers"]["except"].append(UP)
    (copy / "config.json").write_text(json.dumps(config))
    findings = _findings(copy, _source_of(output))
    assert any(f"Tensor {UP}.outlier_weight is BF16" in x and "absent was expected" in x for x in findings)


def _without_weight(held):
    held.pop(f"{UP}.outlier_weight")


def _of_other_rows(held):
    held[f"{UP}.outlier_weight"] = held[f"{UP}.outlier_weight"][1:].clone()


def _named_in_floats(held):
    held[f"{UP}.outlier_columns"] = held[f"{UP}.outlier_columns"].float()


def _without_codes(held):
    for ending in ("weight_packed", "weight_scale", "weight_shape"):
        held.pop(f"{UP}.{ending}")


@pytest.mark.parametrize("edit", [_without_weight, _of_other_rows, _named_in_floats, _without_codes])
def test_source_whose_kept_columns_do_not_fit_is_refused(finished, tmp_path, edit):
    copy = _tampered(finished("compressed-tensors"), tmp_path, edit)
    (copy / "model.safetensors.index.json").unlink()
    shards = {path.name: load_file(path) for path in sorted(copy.glob("*.safetensors"))}
    index = {name: shard for shard, held in shards.items() for name in held}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=rf"{UP}.outlier_columns is .* the checkpoint is damaged"):
        open_source(open_store("file:///"), f"file://{copy}")


@pytest.mark.parametrize("column", [-1, 64])
def test_source_that_keeps_a_column_it_does_not_have_is_refused(finished, tmp_path, column):
    def edit(held):
        held[f"{UP}.outlier_columns"][-1] = column

    copy, store = _tampered(finished("compressed-tensors"), tmp_path, edit), open_store("file:///")
    source = open_source(store, f"file://{copy}")
    with pytest.raises(CheckpointError, match="in order, from 0 to at most 63; the checkpoint is damaged"):
        read_tensors(store, source, [f"{UP}.weight"])


def test_output_can_be_the_source_of_another(finished):
    first = finished("compressed-tensors")
    second = tiny_options(
        first.parents[1], source=str(first), output=f"{first}-again", method="rtn", scheme="W8A16"
    )
    quantize(second)
    config = json.loads(Path(f"{first}-again", "config.json").read_text())["quantization_config"]
    assert "outliers" not in config
    assert not [name for name in read_all_tensors(Path(f"{first}-again")) if "outlier" in name]


def test_plan_says_that_no_engine_reads_them_and_how_much_is_written(finished):
    output = finished("gptq")
    root = output.parents[1]
    sizes = {}
    for count in (0, KEPT):
        options = _options(root, "gptq", outlier_columns=count, output=str(root / f"plan-{count}"))
        plan, _ = build_plan(options, 1)
        memory = plan_memory(bundle_of([plan]), Surroundings(workers=1, idle_bytes=0), Budgets())
        described = describe_plan(plan, memory, num_workers=1, flops_per_second=1e9)
        sizes[count] = described["bytes_out"]
        assert ("no serving engine reads" in format_plan(described)) == bool(count)
    linears = [linear for block in plan.blocks for linear in block.linears]
    added = sum(4 * KEPT + 2 * KEPT * linear.rows for linear in linears)
    # Names, dtypes and offsets of two tensors a linear lie in the headers.
    assert 0 < sizes[KEPT] - sizes[0] - added < 300 * len(linears)
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert written == sizes[KEPT]


_REQUEST = {"source": "m", "output": "q", "calibration": "text", "outlier_columns": 8}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "rtn"}, "needs method gptq, found rtn"),
        ({"target": "vllm"}, "adds tensors that no serving engine reads, and target names vllm"),
        ({"outlier_columns": -1}, "outlier_columns"),
    ],
)
def test_request_that_makes_no_sense_is_refused(given, words):
    with pytest.raises(RecipeError, match=words):
        options_from(_REQUEST | given)
    assert options_from(_REQUEST).outlier_columns == 8
    rules = [{"match": "*", "method": "gptq"}]
    assert options_from(_REQUEST | {"method": "rtn", "rules": rules}).outlier_columns == 8


def test_keeping_all_columns_is_refused(finished):
    root = finished("compressed-tensors").parents[1]
    options = _options(root, "compressed-tensors", outlier_columns=64, output=str(root / "all"))
    with pytest.raises(RecipeError, match="outlier_columns 64 would keep all columns of model.layers.0"):
        build_plan(options, 1)
