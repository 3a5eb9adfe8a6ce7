"""The simulated job is made of the pieces of a real one: same names, ranks, order of stages, homes."""

import dataclasses
from pathlib import Path

import pytest

from quantlib.checkpoint.index import open_checkpoint
from quantlib.inprocess import DirectStages
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.plan import Plan
from quantlib.job.planner import build_plan
from quantlib.job.schedule import Piece, Schedule
from quantlib.simulation.hardware import parse_cluster
from quantlib.simulation.prediction import workload_of
from quantlib.simulation.shapes import shape_of_plan
from quantlib.simulation.simulate import simulate
from quantlib.storage import open_store
from tests.support.thread_cluster import ThreadCluster
from tests.support.tiny_jobs import tiny_options, tiny_source, tiny_text, wide_source

_FIRST = ("capture", "forward")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    tiny_source(folder / "source")
    wide_source(folder / "wide")
    tiny_source(folder / "experts", "glm4_moe", num_hidden_layers=2, moe_intermediate_size=64)
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=800)
    return folder


@pytest.fixture
def stages(monkeypatch):
    """What every stage adds to a schedule, in whatever order overlapping stages do it."""
    added = []
    add = Schedule.add

    def noted(self, pieces):
        pieces = list(pieces)
        # Of the first stage only: after it a cell may have moved to whoever was idle.
        homes = [piece.home for piece in pieces if piece.id.block == 0 and piece.id.stage in _FIRST]
        told = [(p.id, p.rank, [] if _depends_on_homes(p) else sorted(p.after)) for p in pieces]
        added.append((sorted(told), homes))
        add(self, pieces)

    monkeypatch.setattr(Schedule, "add", noted)
    return added


def _depends_on_homes(piece: Piece) -> bool:
    """Whether it waits for another: all but the first capture of every worker do."""
    return piece.id.stage == "capture" and piece.id.block > 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"propagation": "original"},
        {"propagation": "original", "evaluation": None, "checkpoint_every": 1},
        {"propagation": "quantized"},
        {"propagation": "quantized", "correct_targets": True, "evaluation": None},
        {"method": "rtn", "calibration": None, "evaluation": None},
        {"source": "wide", "rules": [{"match": "*.down_proj", "keep": True}]},
        {"source": "experts"},
    ],
    ids=["original", "checkpoints", "quantized", "corrected", "rtn", "tiles", "experts"],
)
def test_stages_add_the_pieces_of_a_real_job(root, stages, tmp_path, workers, changes):
    given = {"sequences": 300, "evaluation_sequences": 290, "checkpoint_every": 0, **changes}
    texts = {name: str(root / f"{name}.jsonl") for name in ("calibration", "evaluation")}
    source = root / given.pop("source", "source")
    options = tiny_options(tmp_path, source=str(source), **{**texts, **given})
    crew, runner = ThreadCluster(workers), DirectStages()
    convert([options], Crew(crew, 1), runner, lambda _: None)
    runner.close()
    crew.close()
    real = _sorted(stages)
    stages.clear()
    plan, _ = build_plan(options, threads=1)
    workload = dataclasses.replace(
        workload_of(options, _shape(plan)), sequences_per_cell=plan.sequences_per_cell
    )
    cluster = parse_cluster(f"{workers}xH100", network="1GB/s", storage="1GB/s")
    simulate(_shape(plan), workload, cluster)
    assert len(real) > 1 or options.method == "rtn"
    is_cut = any(name.stage == "pack" for added in real if options.method == "gptq" for name, *_ in added[0])
    assert is_cut == (source.name == "wide")
    assert _sorted(stages) == real


def _sorted(stages):
    """Without stages of no pieces; units without streams may be added one by one."""
    units = [stage for stage in stages if stage[0] and stage[0][0][0].stage == "unit"]
    if units:
        return sorted(piece for pieces, _ in units for piece in pieces)
    return sorted(stage for stage in stages if stage[0])


def _shape(plan: Plan):
    checkpoint = open_checkpoint(open_store(plan.source), plan.source)
    sizes = {name: entry.end - entry.start for name, entry in checkpoint.tensors.items()}
    return shape_of_plan(plan, checkpoint.config, sizes, device_type="cpu")
