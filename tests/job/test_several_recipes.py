"""Several outputs from one reading: each has the bytes and figures that it would have by itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from quantlib.__main__ import main
from quantlib.errors import LeaseError, PlanMismatchError, RecipeError
from quantlib.inprocess import quantize, quantize_all
from quantlib.job import lease as lease_module
from quantlib.job.bundle import bundle_of
from quantlib.job.lease import Lease, new_record
from quantlib.job.memory import Budgets, Surroundings, plan_memory
from quantlib.job.memory_needs import block_needs, bundled_needs
from quantlib.job.options import JobOptions
from quantlib.job.planner import build_plan
from quantlib.job.stages import Progress
from quantlib.storage import open_store
from tests.support.thread_cluster import ThreadCluster, convert_all_on, convert_in_least_store
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text

# Groups of their own: one keeps what another quantizes, and one rounds what others calibrate.
_RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rounded": {"method": "rtn", "scheme": "W8A16", "format": "gptq"},
    "mixed": {
        "scheme": "W2A16_ASYM",
        "group_size": 16,
        "column_order": "natural",
        "rules": [
            {"match": "*.down_proj", "keep": True},
            {"match": "*.layers.1.mlp.*", "method": "rtn"},
            {"match": "*.k_proj", "method": "rtn"},
            {"match": "*.o_proj", "scheme": "W8A8"},
        ],
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    tiny_source(folder / "source", num_hidden_layers=4, attention_bias=True)
    tiny_source(folder / "experts", "glm4_moe", num_hidden_layers=3, moe_intermediate_size=64)
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=700)
    return folder


def _request(root: Path, folder: str, recipe: str, **given: Any) -> JobOptions:
    """Three cells of calibration rows and two of evaluation rows."""
    counts = {"sequences": 300, "evaluation_sequences": 200, "checkpoint_every": 0}
    return tiny_options(
        root, **{**counts, "output": str(root / folder / recipe), **_RECIPES[recipe], **given}
    )


def _requests(root: Path, folder: str, **given: Any) -> list[JobOptions]:
    return [_request(root, folder, recipe, **given) for recipe in _RECIPES]


@pytest.fixture(scope="module")
def alone(root) -> dict[str, dict[str, Any]]:
    """Recipe -> report of a run of its own."""
    return {recipe: quantize(_request(root, "alone", recipe)) for recipe in _RECIPES}


def _digests(root: Path, folder: str) -> dict[str, dict[str, str]]:
    return {recipe: shard_digests(root / folder / recipe) for recipe in _RECIPES}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    blocks = [{name: b[name] for name in ("relative_error", "cosine", "linears")} for b in report["blocks"]]
    same = ("identity", "evaluation", "calibration", "fallbacks", "shards", "tensors")
    figures = {"blocks": blocks, **{name: report[name] for name in same}}
    return json.loads(json.dumps(figures))  # as it is stored


def test_each_output_is_that_of_a_run_of_its_own(root, alone):
    requests = _requests(root, "together")
    reports = quantize_all(requests)
    assert _digests(root, "together") == _digests(root, "alone")
    for recipe, options, report in zip(_RECIPES, requests, reports, strict=True):
        assert _figures(report) == _figures(alone[recipe])
        others = {Path(uri).name for uri in report["made_with"]}
        assert others == _RECIPES.keys() - {recipe}
        stored = json.loads((Path(options.output) / "quantmill_report.json").read_text())
        assert stored == json.loads(json.dumps(report))
    # The source once, and token rows for each: not as much as three runs.
    read = [report["bytes"]["read"] for report in reports]
    assert read[0] == read[1] < 1.3 * max(report["bytes"]["read"] for report in alone.values())
    assert reports[0]["stages"]["capture"]["calls"] == alone["plain"]["stages"]["capture"]["calls"]
    assert quantize_all(requests) == json.loads(json.dumps(reports)), "what is finished is not done again"


@pytest.mark.parametrize("source", ["source", "experts"])
def test_without_data_blocks_are_read_once_for_all(root, source):
    given = {"method": "rtn", "calibration": None, "evaluation": None, "source": str(root / source)}
    recipes = {"W4": {"scheme": "W4A16"}, "W8": {"scheme": "W8A16"}}

    def requests(folder: str) -> list[JobOptions]:
        place = f"{source} {folder}"
        return [
            tiny_options(root, **given, **recipe, output=str(root / place / name))
            for name, recipe in recipes.items()
        ]

    for options in requests("alone"):
        quantize(options)
    quantize_all(requests("together"))
    for name in recipes:
        found = [shard_digests(root / f"{source} {folder}" / name) for folder in ("alone", "together")]
        assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["routed", "all-experts"])
def test_experts_have_the_bytes_of_a_run_of_their_own(root, routing):
    given = {
        "source": str(root / "experts"),
        "calibration_routing": routing,
        "format": "compressed-tensors",
    }
    requests = [_request(root, f"{routing} alone", recipe, **given) for recipe in ("plain", "rounded")]
    reports = [quantize(options) for options in requests]
    requests = [_request(root, f"{routing} together", recipe, **given) for recipe in ("plain", "rounded")]
    together = quantize_all(requests)
    assert [_figures(report) for report in together] == [_figures(report) for report in reports]


@pytest.mark.slow
def test_workers_and_slices_change_no_byte(root, alone):
    convert_all_on(ThreadCluster(3), _requests(root, "three"))
    assert _digests(root, "three") == _digests(root, "alone")
    reports = convert_in_least_store(_requests(root, "sliced"))
    assert reports[0]["memory"]["most_slices"] > 2
    assert _digests(root, "sliced") == _digests(root, "alone")


def test_block_that_only_rounds_is_solved_whole_where_others_are_sliced(root):
    given = {"rules": [{"match": "*.layers.1.*", "method": "rtn"}], "evaluation": None}
    whole, sliced = (_request(root, folder, "plain", **given) for folder in ("whole", "in slices"))
    quantize(whole)
    (report,) = convert_in_least_store([sliced])
    assert report["memory"]["most_slices"] > 2
    assert shard_digests(Path(sliced.output)) == shard_digests(Path(whole.output))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["observe", "solve", "advance", "write"])
def test_worker_lost_changes_no_byte(root, alone, method):
    folder, cluster = f"lost {method}", ThreadCluster(3)
    cluster.kill_at(method, 6)
    reports = convert_all_on(cluster, _requests(root, folder))
    assert len(reports[0]["history"]["renewals"]) == 1
    assert _digests(root, folder) == _digests(root, "alone")
    for recipe, report in zip(_RECIPES, reports, strict=True):
        assert _figures(report)["evaluation"] == _figures(alone[recipe])["evaluation"]


class _StopError(Exception):
    pass


def _interrupt(requests: list[JobOptions], label: str) -> None:
    def stop(progress: Progress) -> None:
        if progress.label == label:
            raise _StopError

    with pytest.raises(_StopError):
        quantize_all(requests, stop)


def test_what_was_interrupted_goes_on_from_a_checkpoint_together_or_one_by_one(root, alone):
    requests = _requests(root, "resumed", checkpoint_every=1)
    _interrupt(requests, "block 4/4: capture")
    # A recipe by itself takes up its own streams out of those of all.
    second = quantize(requests[0])
    assert second["history"]["from_checkpoint"] == 3
    assert _figures(second) == _figures(alone["plain"])
    reports = quantize_all(requests)
    assert reports[0] == json.loads(json.dumps(second))
    assert [report["history"]["reused_units"] for report in reports[1:]] == [
        ["block-00000", "block-00001", "block-00002", "prelude-00000"]
    ] * 2
    assert [_figures(report) for report in reports] == [_figures(alone[recipe]) for recipe in _RECIPES]


def test_recipes_in_another_order_take_up_the_same_checkpoint(root, alone):
    requests = _requests(root, "turned", checkpoint_every=1)
    _interrupt(requests, "block 4/4: capture")
    turned = [requests[0], requests[2], requests[1]]
    reports = quantize_all(turned)
    assert reports[0]["history"]["from_checkpoint"] == 3
    assert _digests(root, "turned") == _digests(root, "alone")
    assert reports[1]["evaluation"] == alone["mixed"]["evaluation"]


def test_recipe_that_is_added_later_is_made_by_itself(root, alone):
    requests = _requests(root, "added")
    quantize_all(requests[:1])
    reports = quantize_all(requests)
    assert reports[0]["made_with"] == []
    assert [Path(uri).name for uri in reports[1]["made_with"]] == ["mixed"]
    assert _digests(root, "added") == _digests(root, "alone")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequences": 299}, r"wants sequences 299, .*plain 300; what is read and run once"),
        ({"evaluation": None}, "wants evaluation unset"),
        ({"propagation": "quantized"}, "wants propagation quantized"),
        ({"expert_shrinkage": 3}, "expert_shrinkage"),
    ],
)
def test_what_is_done_once_must_be_the_same(root, change, words):
    requests = [_request(root, "differing", "plain"), _request(root, "differing", "mixed", **change)]
    with pytest.raises(RecipeError, match=words) as refused:
        quantize_all(requests)
    assert refused.value.before_work
    assert not (root / "differing").exists()


def test_several_with_quantized_propagation_are_refused(root):
    with pytest.raises(RecipeError, match="need propagation original"):
        quantize_all([_request(root, "q", recipe, propagation="quantized") for recipe in ("plain", "mixed")])


def test_biases_must_be_corrected_alike(root):
    """Where all that read an input are rounded its sums lack what biases are corrected by."""
    given = {"correct_biases": True, "sequences": 40, "evaluation": None}
    recipes = ("plain", "mixed")
    singles = [quantize(_request(root, "biases alone", recipe, **given)) for recipe in recipes]
    reports = quantize_all([_request(root, "biases", recipe, **given) for recipe in recipes])
    assert [_figures(report) for report in reports] == [_figures(report) for report in singles]
    rounded = _request(root, "others", "mixed", **given, rules=[{"match": "*.o_proj", "method": "rtn"}])
    with pytest.raises(RecipeError, match="corrects biases of model.layers.0.self_attn.o_proj"):
        quantize_all([_request(root, "others", "plain", **given), rounded])


def test_outputs_begun_with_other_settings_are_not_made_together(root):
    requests = _requests(root, "threads")[:2]
    _interrupt(requests[:1], "block 2/4: capture")
    plan = Path(requests[0].output + ".quantmill") / "plan.json"
    values = json.loads(plan.read_text())
    plan.write_text(json.dumps({**values, "sequences_per_cell": 7}))
    with pytest.raises(PlanMismatchError, match="sequences_per_cell 7, .* not begun\n? ?together"):
        quantize_all(requests)


def test_output_that_another_run_holds_leaves_the_others_alone(root, monkeypatch):
    monkeypatch.setattr(lease_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.1)
    requests = _requests(root, "held")
    work = "file://" + requests[1].output + ".quantmill"
    with (
        Lease.acquire(open_store(work), work, record=dataclasses.replace(new_record(), machine="elsewhere")),
        pytest.raises(LeaseError, match="is held by"),
    ):
        quantize_all(requests)
    quantize(requests[0])


def test_memory_is_planned_for_the_codes_of_all_and_one_live_block(root):
    plans = [build_plan(options, 1)[0] for options in _requests(root, "memory")]
    bundle = bundle_of(plans)
    each = [block_needs(plan, plan.blocks[0]) for plan in plans]
    needs = bundled_needs(bundle, 0)
    assert needs.packed == sum(found.packed for found in each)
    assert needs.source == each[0].source
    assert [group.total for group in needs.groups] == [group.total for group in each[0].groups]
    around = Surroundings(workers=1, idle_bytes=0)
    streams = [
        plan_memory(found, around, Budgets()).worker["activations"]
        for found in (bundle_of(plans[:1]), bundle)
    ]
    # Of evaluation rows one more stream for each recipe: 300 + 2 x 200 rows before, 300 + 4 x 200 now.
    assert streams[1] / streams[0] == pytest.approx(1100 / 700, rel=0.35)


def test_command_makes_an_output_for_each_recipe(root, tmp_path, capsys):
    for name, text in {"four": 'scheme = "W4A16"', "eight": 'scheme = "W8A16"\nmethod = "rtn"'}.items():
        (tmp_path / f"{name}.toml").write_text(text + "\ngroup_size = 32\n")
    line = ["quantize", str(root / "source"), str(tmp_path / "out")]
    line += [f"--recipe={tmp_path}/{name}.toml" for name in ("four", "eight")]
    line += ["--calibration", str(root / "calibration.jsonl"), "--sequences", "8", "--sequence-length", "32"]
    line += ["--runner", "inprocess", "--threads-per-worker", "1"]
    assert main([*line, "--json"]) == 0
    four, eight = json.loads(capsys.readouterr().out)
    assert [report["output"].removeprefix("file://") for report in (four, eight)] == [
        str(tmp_path / "out" / name) for name in ("four", "eight")
    ]
    assert all((tmp_path / "out" / name / "config.json").exists() for name in ("four", "eight"))
    assert main(["plan", *line[1:]]) == 0
    assert capsys.readouterr().out.count("blocks") >= 2
    with pytest.raises(SystemExit):
        main(["plan", *line[1:], "--recipe"])
    assert main(["plan", *line[1:], f"--recipe={tmp_path}/four.toml"]) == 2
    assert "two recipes are named four" in capsys.readouterr().err
