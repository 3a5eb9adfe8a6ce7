"""GPTQ on routed experts: which tokens count, what stands in for those an expert lacks, the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.inprocess import quantize
from quantlib.job.bundle import bundle_of
from quantlib.job.expert_groups import token_shares
from quantlib.job.memory import Budgets, Room, Surroundings, heap_bytes, plan_memory
from quantlib.job.options import JobOptions
from quantlib.job.planner import build_plan
from tests.support.thread_cluster import ThreadCluster, convert_in_least_store, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text

_WAYS: dict[str, dict[str, Any]] = {
    "routed": {},
    "all-experts": {"calibration_routing": "all-experts"},
    "own tokens alone": {"expert_shrinkage": 0},
    "corrected": {"propagation": "quantized", "correct_targets": True},
    "corrected, all experts": {
        "propagation": "quantized",
        "correct_targets": True,
        "calibration_routing": "all-experts",
    },
}
_WITHOUT_TOKENS, _WITH_FEW = 3, 2


def _biased_router(source: Path) -> None:
    """No token is routed to expert 3, and few are to expert 2."""
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            tensors[name] = torch.tensor([0.0, 0.0, -0.8, -1e4])
        save_file(tensors, shard, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    source = tiny_source(folder / "source", "glm4_moe", num_hidden_layers=3, moe_intermediate_size=64)
    _biased_router(source)
    tiny_source(folder / "scaled", "mixtral", num_hidden_layers=2)
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=800)
    return folder


def _options(root: Path, name: str, way: str, **overrides: Any) -> JobOptions:
    """Three cells of either corpus."""
    given = {"sequences": 300, "evaluation_sequences": 300, "checkpoint_every": 0}
    return tiny_options(root, output=str(root / name), **{**given, **_WAYS[way], **overrides})


@pytest.fixture(scope="module")
def alone(root) -> dict[str, dict[str, Any]]:
    """Way -> report of a run in one process with all the memory it wants."""
    return {way: quantize(_options(root, f"alone {way}", way)) for way in _WAYS}


def _experts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = [linear for block in report["blocks"] for linear in block["linears"]]
    return {row["name"]: row for row in rows if ".experts." in row["name"]}


def _of(report: dict[str, Any], expert: int) -> list[dict[str, Any]]:
    found = [row for name, row in _experts(report).items() if f".experts.{expert}." in name]
    assert found
    return found


def test_report_counts_the_tokens_of_every_expert(alone):
    for way in ("routed", "corrected"):
        report = alone[way]
        assert {row["tokens"] for row in _of(report, _WITHOUT_TOKENS)} == {0}
        assert all(0 < row["tokens"] < 100 for row in _of(report, _WITH_FEW))
        for kind in ("gate_proj", "up_proj", "down_proj"):
            for block in report["blocks"]:
                rows = [row for row in block["linears"] if ".experts." in row["name"] and kind in row["name"]]
                # Every token chooses two.
                assert not rows or sum(row["tokens"] for row in rows) == 2 * 300 * 32
                # As many tokens as an expert has input features: 64 are all that these have.
                assert {row["shared_tokens"] for row in rows} <= {64.0}
        assert {row["dropped_tokens"] for row in _experts(report).values()} == {0}
    everything = _experts(alone["all-experts"]).values()
    assert {(row["tokens"], row["shared_tokens"]) for row in everything} == {(300 * 32, None)}


def test_expert_without_tokens_is_calibrated_with_those_of_others(alone):
    without = _of(alone["routed"], _WITHOUT_TOKENS)
    assert {row["fallback"] for row in without} == {"no_routed_tokens"}
    assert all(row["damping_attempts"] == 1 and row["bits"] == 4 for row in without)
    few = [row for expert in (0, 1, 2) for row in _of(alone["routed"], expert)]
    assert {row["fallback"] for row in few} == {None}
    lost = _of(alone["own tokens alone"], _WITHOUT_TOKENS)
    assert {row["fallback"] for row in lost} == {"rtn_no_tokens"}


@pytest.mark.parametrize("way", _WAYS)
def test_no_expert_is_zero_or_of_another_format(root, alone, way):
    output = Path(_options(root, f"alone {way}", way).output)
    tensors = {
        name: tensor for shard in output.glob("*.safetensors") for name, tensor in load_file(shard).items()
    }
    packed = {name: t for name, t in tensors.items() if ".experts." in name and "weight_packed" in name}
    assert len(packed) == len(_experts(alone[way]))
    by_kind: dict[str, set[Any]] = {}
    for name, tensor in packed.items():
        by_kind.setdefault(name.split(".")[-2], set()).add((tensor.dtype, tuple(tensor.shape)))
        assert len(tensor.unique()) > 8
    assert all(len(kinds) == 1 for kinds in by_kind.values())
    gates = [name for name in tensors if name.endswith("mlp.gate.weight")]
    assert gates and all(tensors[name].dtype == torch.bfloat16 for name in gates)
    assert any(name.endswith("e_score_correction_bias") for name in tensors)


def test_tokens_of_others_help_an_expert_without_any(alone):
    worst = {way: _of(alone[way], _WITHOUT_TOKENS) for way in ("routed", "own tokens alone")}
    # Both by the Hessian of what others read; without it the error is that of the bare weights.
    assert sum(row["relative_error"] for row in worst["routed"]) < 0.8 * sum(
        row["relative_error"] for row in worst["own tokens alone"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", _WAYS)
def test_workers_and_slices_change_no_byte(root, alone, way):
    wanted = shard_digests(root / f"alone {way}")
    options = _options(root, f"three {way}", way)
    convert_on(ThreadCluster(3), options)
    assert shard_digests(Path(options.output)) == wanted
    options = _options(root, f"sliced {way}", way)
    (report,) = convert_in_least_store([options])
    assert report["memory"]["most_slices"] > 2
    assert shard_digests(Path(options.output)) == wanted
    assert _experts(report) == _experts(alone[way])


def _batches(cluster: ThreadCluster) -> list[tuple[int, tuple[int, ...]]]:
    """Fills with worker and input groups of every solve of block 1."""
    found: list[tuple[int, tuple[int, ...]]] = []

    def note(worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "solve" and arguments[0] == 1:
            found.append((worker, tuple(arguments[2])))

    cluster.before = note
    return found


def test_alike_experts_are_solved_as_batches_of_those_a_worker_has(root, alone):
    """Gates and downs of four experts and the shared one: two batches, or for two workers twice as many."""
    batches = {}
    for workers in (1, 2):
        options, cluster = _options(root, f"batched {workers}", "routed"), ThreadCluster(workers)
        batches[workers] = _batches(cluster)
        convert_on(cluster, options)
        assert shard_digests(Path(options.output)) == shard_digests(root / "alone routed")
    assert sorted(len(groups) for _, groups in batches[1])[-2:] == [5, 5]
    assert sorted(len(groups) for _, groups in batches[2])[-4:] == [2, 2, 3, 3]
    assert sorted(group for _, groups in batches[2] for group in groups) == list(range(12))


def test_experts_are_solved_one_by_one_where_a_batch_would_send_activations_to_disk(root, tmp_path):
    """Of so few rows a solve takes most; one byte less than a batch wants is enough for single experts."""
    source = tiny_source(tmp_path / "source", "glm4_moe", num_hidden_layers=2, moe_intermediate_size=128)
    few = {"source": str(source), "sequences": 4, "evaluation": None, "sequence_length": 8}
    roomy, tight = (_options(root, name, "routed", **few) for name in ("roomy", "tight"))
    bundle = bundle_of([build_plan(roomy, 1)[0]])
    around = Surroundings(workers=1, idle_bytes=0, kept_bytes=heap_bytes(bundle, roomy))
    wanted = plan_memory(bundle, around, Budgets())
    assert wanted.has_batches
    sizes = {}
    for options, size in ((roomy, None), (tight, sum(wanted.worker.values()) - 1)):
        cluster = ThreadCluster(1)
        cluster.room, found = Room(worker_bytes=size), _batches(cluster)
        assert convert_on(cluster, options)["memory"]["most_slices"] == 1
        sizes[options.output] = max(len(groups) for _, groups in found)
    assert sizes == {roomy.output: 5, tight.output: 1}
    assert shard_digests(Path(tight.output)) == shard_digests(Path(roomy.output))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["observe", "totals", "solve"])
def test_worker_lost_changes_no_byte(root, alone, method):
    options, cluster = _options(root, f"lost {method}", "routed"), ThreadCluster(3)
    cluster.kill_at(method, 4)
    report = convert_on(cluster, options)
    assert len(report["history"]["renewals"]) == 1
    assert shard_digests(Path(options.output)) == shard_digests(root / "alone routed")
    assert _experts(report) == _experts(alone["routed"])


def test_tokens_that_are_not_finite_in_a_foreign_expert_are_dropped_and_counted(root, tmp_path):
    """Nobody is routed to expert 3, whose activations overflow: no calibration row is to blame."""
    source = tiny_source(tmp_path / "source", "glm4_moe", num_hidden_layers=3, moe_intermediate_size=64)
    _biased_router(source)
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if ".experts.3." in name and not name.endswith("down_proj.weight"):
                tensors[name] *= 1e30
        save_file(tensors, shard, metadata={"format": "pt"})
    given = {"source": str(source), "evaluation": None}
    report = quantize(_options(root, str(tmp_path / "output"), "routed", **given))
    assert report["calibration"]["excluded_rows"] == []
    dropped = {name: row["dropped_tokens"] for name, row in _experts(report).items() if row["dropped_tokens"]}
    assert set(dropped) == {name for name in _experts(report) if name.endswith("experts.3.down_proj")}
    assert all(count >= 64 for count in dropped.values())


def test_names_of_the_file_are_kept_where_modules_have_others(root, tmp_path):
    options = _options(root, str(tmp_path / "output"), "routed", source=str(root / "scaled"))
    assert len(_experts(quantize(options))) == 2 * 4 * 3
    index = json.loads((tmp_path / "output" / "model.safetensors.index.json").read_text())
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in index["weight_map"]
    assert "model.layers.1.block_sparse_moe.gate.weight" in index["weight_map"]


def test_all_experts_are_summed_by_one_exponent(root):
    """Cell 0 says nothing of an expert that none of its tokens is routed to."""
    options, cluster = _options(root, "exponents", "own tokens alone", evaluation=None), ThreadCluster(1)
    exponents: dict[int, list[int]] = {}

    def note(_: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "totals":
            block, groups, exponents[block], _ = arguments
            assert groups == tuple(range(len(groups)))

    cluster.before = note
    convert_on(cluster, options)
    for block in (1, 2):
        # After those of attention, before those of the shared expert: in turn what an expert is given, and
        # what its down projection reads.
        firsts, downs = exponents[block][2:10:2], exponents[block][3:10:2]
        assert (len(set(firsts)), len(set(downs))) == (1, 1)
        assert len(exponents[block]) == 12


def test_an_expert_is_expected_to_see_its_share_of_the_tokens(root):
    plan, _ = build_plan(_options(root, "shares", "routed"), 1)
    dense, sparse = (token_shares(plan, plan.blocks[index]) for index in (0, 1))
    assert set(dense.values()) == {1.0}
    # Two of four.
    assert {share for name, share in sparse.items() if ".experts." in name} == {0.5}
    assert {share for name, share in sparse.items() if ".experts." not in name} == {1.0}
