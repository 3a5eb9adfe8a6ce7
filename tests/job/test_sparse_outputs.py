"""Outputs that keep single weights beside codes: written, verified, evaluated, read again, interrupted."""

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

PER_MILLE = 30
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
    root = tmp_path_factory.mktemp("sparse")
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
    given = {"outlier_weights": PER_MILLE, **_RECIPES[recipe]}
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
def test_every_linear_of_gptq_keeps_as_many_weights_of_a_row_and_reads_as_them(finished, recipe):
    output = finished(recipe)
    written, original = read_all_tensors(output), read_all_tensors(_source_of(output))
    report = json.loads((output / "quantmill_report.json").read_text())
    told = {row["name"]: row["kept_weights"] for block in report["blocks"] for row in block["linears"]}
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    packer, store = FORMATS[quantization["quant_method"]], open_store("file:///")
    source = open_source(store, f"file://{output}", levels_dtype="F32")
    kept = {name.removesuffix(".outlier_index") for name in written if name.endswith(".outlier_index")}
    without = {name.removesuffix(".weight") for name in source.decoded} - kept
    assert without == {name for name in without if name.endswith("o_proj") and recipe == "compressed-tensors"}
    assert quantization["outliers"] == {"weights_per_mille": PER_MILLE, "except": sorted(without)}
    assert len(kept) > 10 and told == {
        name: written[f"{name}.outlier_index"].numel() for name in kept
    } | dict.fromkeys(without, 0)
    for name in kept:
        index_RM, weight_RM = written[f"{name}.outlier_index"].long(), written[f"{name}.outlier_weight"]
        assert (written[f"{name}.outlier_index"].dtype, weight_RM.dtype) == (torch.uint16, torch.bfloat16)
        # The layout's own codes, as a reader sees them who knows nothing else.
        plain_RC = packer.unpack(name, written, packer.scheme_of(quantization, name)).dequantize()
        level_RC = read_tensors(store, source, [f"{name}.weight"])[f"{name}.weight"]
        assert index_RM.shape == (len(level_RC), max(1, round(level_RC.shape[1] * PER_MILLE / 1000)))
        assert (index_RM.diff(dim=1) > 0).all()
        assert torch.equal(level_RC.gather(1, index_RM), weight_RM.float())
        others_RC = torch.ones_like(level_RC, dtype=torch.bool).scatter_(1, index_RM, False)
        assert torch.equal(level_RC[others_RC], plain_RC[others_RC])
        if f"{name}.weight" in original:
            gap, plain_gap = ((x - original[f"{name}.weight"].float()).norm() for x in (level_RC, plain_RC))
            # Scales do not reach what is kept: its codes are the outermost levels.
            assert gap < plain_gap < 4 * gap


def test_weights_kept_bring_the_output_nearer_to_the_source(finished, tmp_path):
    kept = json.loads((finished("quantized") / "quantmill_report.json").read_text())
    root = finished("quantized").parents[1]
    plain = quantize(_options(root, "quantized", outlier_weights=0, output=str(tmp_path / "plain")))
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


UP = "model.layers.0.mlp.up_proj"


def _tampered(output: Path, folder: Path, edit) -> Path:
    copy = folder / "output"
    shutil.copytree(output, copy)
    weight_map = {}
    for shard in sorted(copy.glob("*.safetensors")):
        held = load_file(shard)
        if f"{UP}.outlier_index" in held:
            edit(held)
            save_file(held, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(held, shard.name)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return copy


@pytest.mark.parametrize("ending", ["outlier_index", "outlier_weight"])
def test_tensor_of_kept_weights_that_is_gone_is_found(finished, tmp_path, ending):
    output = finished("compressed-tensors")
    copy = _tampered(output, tmp_path, lambda held: held.pop(f"{UP}.{ending}"))
    found = [x for x in _findings(copy, _source_of(output)) if f"Tensor {UP}.{ending} is absent" in x]
    assert len(found) == 1


def test_kept_weights_where_the_config_names_none_are_found(finished, tmp_path):
    output = finished("compressed-tensors")
    copy = tmp_path / "output"
    shutil.copytree(output, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["outliers"]["except"].append(UP)
    (copy / "config.json").write_text(json.dumps(config))
    findings = _findings(copy, _source_of(output))
    assert any(f"Tensor {UP}.outlier_index is U16" in x and "absent was expected" in x for x in findings)


def _without_weight(held):
    held.pop(f"{UP}.outlier_weight")


def _of_other_rows(held):
    for ending in ("outlier_index", "outlier_weight"):
        held[f"{UP}.{ending}"] = held[f"{UP}.{ending}"][1:].clone()


def _of_one_weight_less(held):
    held[f"{UP}.outlier_weight"] = held[f"{UP}.outlier_weight"][:, 1:].clone()


def _named_in_int32(held):
    held[f"{UP}.outlier_index"] = held[f"{UP}.outlier_index"].int()


def _named_once(held):
    held[f"{UP}.outlier_index"] = held[f"{UP}.outlier_index"][0].clone()


def _in_bytes(held):
    held[f"{UP}.outlier_weight"] = held[f"{UP}.outlier_weight"].to(torch.int8)


def _without_codes(held):
    for ending in ("weight_packed", "weight_scale", "weight_shape"):
        held.pop(f"{UP}.{ending}")


@pytest.mark.parametrize(
    "edit",
    [_without_weight, _of_other_rows, _of_one_weight_less, _named_in_int32, _named_once, _in_bytes]
    + [_without_codes],
)
def test_source_whose_kept_weights_do_not_fit_is_refused(finished, tmp_path, edit):
    copy = _tampered(finished("compressed-tensors"), tmp_path, edit)
    with pytest.raises(CheckpointError, match=rf"{UP}.outlier_index is .* the checkpoint is damaged"):
        open_source(open_store("file:///"), f"file://{copy}")


def test_source_that_keeps_columns_and_weights_of_a_linear_is_refused(finished, tmp_path):
    def edit(held):
        held[f"{UP}.outlier_columns"] = torch.tensor([3, 5], dtype=torch.int32)

    copy = _tampered(finished("compressed-tensors"), tmp_path, edit)
    with pytest.raises(CheckpointError, match=f"{UP} has both outlier_columns and outlier_index"):
        open_source(open_store("file:///"), f"file://{copy}")


def _beyond(held):
    held[f"{UP}.outlier_index"][-1, -1] = 64


def _not_rising(held):
    held[f"{UP}.outlier_index"][-1, 0] = held[f"{UP}.outlier_index"][-1, 1]


def _not_finite(held):
    held[f"{UP}.outlier_weight"][-1, 0] = float("nan")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_beyond, "outlier_index must name the columns of every row in order, from 0 to at most 63"),
        (_not_rising, "outlier_index must name the columns of every row in order, from 0 to at most 63"),
        (_not_finite, "outlier_weight must be finite, found NaN"),
    ],
)
def test_source_that_keeps_weights_it_cannot_have_is_refused(finished, tmp_path, edit, said):
    copy, store = _tampered(finished("compressed-tensors"), tmp_path, edit), open_store("file:///")
    source = open_source(store, f"file://{copy}")
    with pytest.raises(CheckpointError, match=f"{said}.*the checkpoint is damaged"):
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
    for per_mille in (0, PER_MILLE):
        options = _options(root, "gptq", outlier_weights=per_mille, output=str(root / f"plan-{per_mille}"))
        plan, _ = build_plan(options, 1)
        memory = plan_memory(bundle_of([plan]), Surroundings(workers=1, idle_bytes=0), Budgets())
        described = describe_plan(plan, memory, num_workers=1, flops_per_second=1e9)
        sizes[per_mille] = described["bytes_out"]
        assert ("no serving engine reads" in format_plan(described)) == bool(per_mille)
    linears = [linear for block in plan.blocks for linear in block.linears]
    added = sum(4 * linear.rows * round(linear.columns * PER_MILLE / 1000) for linear in linears)
    # Names, dtypes and offsets of two tensors a linear lie in the headers.
    assert 0 < sizes[PER_MILLE] - sizes[0] - added < 300 * len(linears)
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert written == sizes[PER_MILLE]
    quantized = json.loads((output / "quantmill_report.json").read_text())["quantized"]
    plain = sum(
        tensor.nbytes
        for name, tensor in read_all_tensors(output).items()
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert quantized["size_bytes"] == plain + added


_REQUEST = {"source": "m", "output": "q", "calibration": "text", "outlier_weights": 5}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "rtn"}, "outlier_weights 5 needs method gptq, found rtn"),
        ({"target": "vllm"}, "adds tensors that no serving engine reads, and target names vllm"),
        ({"outlier_columns": 8}, "outlier_columns 8 and outlier_weights 5 are two forms of the same"),
    ],
)
def test_request_that_makes_no_sense_is_refused(given, words):
    with pytest.raises(RecipeError, match=words):
        options_from(_REQUEST | given)
    assert options_from(_REQUEST).outlier_weights == 5
    rules = [{"match": "*", "method": "gptq"}]
    assert options_from(_REQUEST | {"method": "rtn", "rules": rules}).outlier_weights == 5
