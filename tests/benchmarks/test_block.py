"""The floor of a block counts what it must, its stages are all measured, and little has to be installed."""

import json
import math
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from quantlib import linalg
from quantlib.group_solver import GroupSolver
from quantlib.methods import gptq
from quantlib.schemes import scheme_from_name
from quantlib.simulation.config_shapes import shape_of_config

BLOCK = Path(__file__).with_name("block.py")
# What need not be where it runs, and what imports that unasked.
ABSENT = ("ray", "prefect", "pydantic", "hypothesis", "obstore", "s3fs", "botocore", "boto3", "gguf")
PROGRAM = """
import runpy, sys
script, absent, *sys.argv[1:] = sys.argv[1:]
for name in absent.split(","):
    sys.modules[name] = None
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""
TOKENS = 512 * 2048


@pytest.fixture(scope="module")
def modules():
    """Those of the benchmark, as it imports them itself."""
    sys.path.insert(0, str(BLOCK.parent))
    import block_floor
    import block_models
    import block_plan
    import block_run
    import block_solve
    import block_stopwatch

    yield {
        name: module
        for module in (block_floor, block_models, block_plan, block_run, block_solve, block_stopwatch)
        for name in [module.__name__]
    }
    sys.path.remove(str(BLOCK.parent))


def run_without_packages(*arguments: str) -> str:
    command = [sys.executable, "-c", PROGRAM, str(BLOCK), ",".join(ABSENT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shape_of(model):
    (block,) = shape_of_config(model.name, model.config, scheme_from_name("W4A16", 128)).blocks
    return block


@pytest.mark.parametrize(
    ("name", "hidden", "inner", "keys", "blocks", "expected"),
    [
        ("llama-3.1-405b", 16384, 53248, 1024, 126, (3.188e9, 8.51e17, 4.81e17, 6.9e15, 1.06e16)),
        ("llama-3.1-70b", 8192, 28672, 1024, 80, (0.856e9, 1.46e17, 0.86e17, 6.7e14, 9.5e14)),
    ],
)
def test_work_of_large_blocks_is_closed_form(modules, name, hidden, inner, keys, blocks, expected):
    model = modules["block_models"].block_model(name)
    work = modules["block_floor"].work_of(shape_of(model), TOKENS, 2048)
    weights = 2 * hidden**2 + 2 * keys * hidden + 3 * inner * hidden
    forward = 2 * TOKENS * weights + 2 * TOKENS * 2048 * hidden
    statistics = TOKENS * (3 * hidden**2 + inner**2)
    factor = (3 * hidden**3 + inner**3) / 3
    columns = (2 * hidden + 2 * keys + 2 * inner) * hidden**2 + hidden * inner**2
    found = (work.forward, work.statistics, work.factor, work.columns)
    assert found == pytest.approx((forward, statistics, factor, columns), rel=1e-12)
    assert work.source_bytes == 2 * (weights + 2 * hidden)
    # What is known of the whole models.
    assert model.num_alike == blocks
    totals = (weights, *(blocks * one for one in found))
    assert totals == pytest.approx(expected, rel=0.01)


def test_floors_divide_work_by_measured_rates(modules):
    floor = modules["block_floor"]
    work = floor.Work(
        forward=600.0, statistics=300.0, factor=20.0, columns=40.0, source_bytes=70, packed_bytes=16
    )
    rates = floor.Rates(bf16=100.0, fp32=10.0, copied=1000.0, from_host=7.0, to_host=8.0)
    expected = {"load": 10.0, "forward": 6.0, "statistics": 3.0, "factor": 2.0, "columns": 4.0, "pack": 2.0}
    assert floor.floors(work, rates, torch.bfloat16) == expected
    # Without fast products of 16 bits.
    slower = expected | {"forward": 60.0, "statistics": 30.0}
    assert floor.floors(work, rates, torch.float32) == slower


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("llama-3.1-70b", {}),
        ("llama-3.1-70b", {"inner": 1024}),
        ("deepseek-v3-experts", {}),
        ("deepseek-v3-experts", {"experts": 16}),
        ("smollm2", {}),
    ],
)
def test_stored_tensors_are_those_of_known_shapes(modules, name, cut):
    models = modules["block_models"]
    model = models.block_model(name, **cut)
    stored = models.stored_shapes(model.config)
    in_block = [math.prod(shape) for tensor, shape in stored.items() if tensor.startswith("model.layers.0.")]
    assert 2 * sum(in_block) == shape_of(model).source_bytes
    assert (model.num_alike is None) == bool(cut)


def test_cut_block_keeps_hidden_size_and_has_no_more_inner_features(modules):
    models = modules["block_models"]
    cut = models.stored_shapes(models.block_model("llama-3.1-70b", inner=1024).config)
    sizes = {name: cut[f"model.layers.0.{name}_proj.weight"] for name in ("self_attn.q", "mlp.down")}
    assert sizes == {"self_attn.q": (1024, 8192), "mlp.down": (8192, 1024)}


def test_experts_that_cannot_be_routed_to_are_refused(modules):
    with pytest.raises(SystemExit, match="multiple of 8 from 16 on"):
        modules["block_models"].block_model("deepseek-v3-experts", experts=12)


def test_block_of_smollm2_is_measured_without_packages_of_a_cluster(tmp_path):
    written = tmp_path / "figures.json"
    printed = run_without_packages(
        *("--shape", "smollm2", "--sequences", "1", "--sequence-length", "256"),
        *("--device", "cpu", "--threads", "1", "--propagation", "quantized", "--json", str(written)),
    )
    found = json.loads(written.read_text())
    block, parts = found["block"], {part["part"]: part for part in found["block"]["parts"]}
    assert parts.keys() == {
        *("load", "forward", "look through inputs", "statistics", "exact sums", "sums to host", "Hessian"),
        *("factor", "scales", "columns", "weight energy", "error energy", "pack", "rest"),
    }
    assert all(part["seconds"] > 0 for part in parts.values())
    assert block["stages"].keys() == {"load", "capture", "sums to host", "solve", "propagate"}
    whole = sum(part["seconds"] for part in parts.values())
    assert whole == pytest.approx(block["block"]["seconds"], rel=1e-6)
    # Both forwards, of which the second is through the packed block.
    assert parts["forward"]["flops"] == 2 * block["work"]["forward"]
    assert block["device_hours"] == pytest.approx(30 * whole / 3600)
    assert block["linears"] == 7
    assert block["fallbacks"] == 0
    assert 0 < block["mean_relative_error"] < 0.01
    for part in parts:
        assert f"\n{part} " in printed


def test_block_of_experts_is_the_same_in_any_number_of_passes(modules):
    models = modules["block_models"]
    model = models.tiny_model(models.block_model("deepseek-v3-experts"))
    errors = []
    for passes in (1, 3):
        watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
        request = modules["block_plan"].BlockRequest(
            model=model, device="cpu", sequences=1, sequence_length=256, passes=passes
        )
        _, linears = modules["block_run"].run_request(request, watch)
        assert watch.stages["capture"].calls == passes
        errors.append({row["name"]: row["relative_error"] for row in linears})
    # 16 experts, a shared one, and latent attention.
    assert len(errors[0]) == 3 * 17 + 5
    assert errors[0] == errors[1]


def test_only_first_linears_of_experts_are_solved_with_sums_of_all_tokens(modules, monkeypatch):
    models = modules["block_models"]
    model = models.tiny_model(models.block_model("deepseek-v3-experts"))
    whole, given = GroupSolver.solve_batch, {}

    def noting(self, block, groups, tensors, statistics, tokens):
        for group, sums in zip(groups, statistics, strict=True):
            given[block.input_groups[group]] = [len(kind) for kind in sums]
        return whole(self, block, groups, tensors, statistics, tokens)

    monkeypatch.setattr(GroupSolver, "solve_batch", noting)
    watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
    request = modules["block_plan"].BlockRequest(model=model, device="cpu", sequences=1, sequence_length=64)
    modules["block_run"].run_request(request, watch)
    first = {names for names in given if ".experts." in names[0] and len(names) == 2}
    assert len(first) == 16
    assert all(given[names] == [1, 0, 1 if names in first else 0] for names in given)


def test_functions_are_watched_wherever_they_are_imported_and_only_meanwhile(modules):
    watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
    before = gptq.factor_hessian
    problem = modules["block_solve"].solve_problem(64, 128, device=torch.device("cpu"), group_size=32)
    rates = modules["block_floor"].Rates(bf16=1.0, fp32=1.0, copied=1.0, from_host=1.0, to_host=1.0)
    with watch.watching():
        assert gptq.factor_hessian is not before
        assert linalg.factor_hessian is gptq.factor_hessian
        modules["block_solve"].our_row(problem, watch, rates)
    assert gptq.factor_hessian is before
    assert linalg.factor_hessian is before
    calls = {part: spent.calls for (_, part), spent in watch.parts.items()}
    assert calls == dict.fromkeys(("factor", "scales", "columns", "weight energy", "error energy"), 1)


def test_options_of_a_job_reach_the_solver_of_one_weight(modules):
    problem = modules["block_solve"].solve_problem(64, 128, device=torch.device("cpu"), group_size=32)
    rates = modules["block_floor"].Rates(bf16=1.0, fp32=1.0, copied=1.0, from_host=1.0, to_host=1.0)
    errors = []
    for options in ({}, {"descent_passes": 3}):
        watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
        settings = modules["block_plan"].settings_with(options)
        errors.append(modules["block_solve"].our_row(problem, watch, rates, settings).error)
    # What passes of descent are for.
    assert errors[1] < errors[0]


def test_part_is_without_the_parts_inside_it(modules, monkeypatch):
    example = ModuleType("quantlib.example")
    example.inner = lambda: None
    example.outer = lambda: (example.inner(), example.inner())
    monkeypatch.setitem(sys.modules, example.__name__, example)
    # A clock that goes on by a second whenever somebody looks at it.
    clock = SimpleNamespace(perf_counter=partial(next, count()))
    monkeypatch.setattr(modules["block_stopwatch"], "time", clock)
    watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
    watched = {"outer": "quantlib.example:outer", "inner": "quantlib.example:inner"}
    with watch.watching(watched), watch.stage("stage"):
        example.outer()
    spent = {part: (found.seconds, found.calls) for (_, part), found in watch.parts.items()}
    assert spent == {"outer": (3.0, 1), "inner": (2.0, 2)}
    assert watch.stages["stage"].seconds == 7.0
    assert watch.rest("stage") == 2.0


def test_error_of_a_solver_is_that_of_its_levels(modules):
    solve = modules["block_solve"]
    problem = solve.solve_problem(48, 64, device=torch.device("cpu"), group_size=32)
    weight_RC, hessian_CC = problem.weight_RC.double(), problem.hessian_CC.double()
    x_NC = problem.x_NC.double()
    # The fixed-point sum of fp32 products of bf16 inputs.
    assert torch.allclose(hessian_CC, x_NC.T @ x_NC, rtol=1e-5, atol=1e-5 * hessian_CC.max().item())
    assert solve.relative_error(problem, 0.9 * problem.weight_RC.float()) == pytest.approx(0.01, rel=1e-4)
    levels_RC = (problem.weight_RC.float() * 100).round() / 100
    error_RC = weight_RC - levels_RC.double()
    expected = (
        torch.trace(error_RC @ hessian_CC @ error_RC.T) / torch.trace(weight_RC @ hessian_CC @ weight_RC.T)
    ).item()
    assert solve.relative_error(problem, levels_RC) == pytest.approx(expected, rel=1e-4)


def test_solve_of_one_weight_has_a_row_for_every_tool(tmp_path):
    written = tmp_path / "figures.json"
    printed = run_without_packages(
        *("--solve", "64x256", "--device", "cpu", "--threads", "1", "--peers", "--json", str(written)),
        *("--set", "scale_search=minmax", "--set", "refit_scales=true"),
    )
    rows = {row["tool"]: row for row in json.loads(written.read_text())["solves"]["rows"]}
    assert rows.keys() == {"Quantmill", "llm-compressor", "gptqmodel"}
    assert rows["Quantmill"]["seconds"] > 0
    assert 0 < rows["Quantmill"]["error"] < 0.05
    # They need pydantic, among others.
    for tool in ("llm-compressor", "gptqmodel"):
        assert rows[tool]["seconds"] is None
        assert rows[tool]["said"].startswith("not here: ")
        assert rows[tool]["said"] in printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_block_on_gpu_has_memory_of_every_stage_and_links_to_the_host(tmp_path):
    written = tmp_path / "figures.json"
    run_without_packages(
        *("--shape", "smollm2", "--sequences", "16", "--device", "cuda"),
        *("--propagation", "quantized", "--json", str(written)),
    )
    found = json.loads(written.read_text())
    assert all(spent["device_bytes"] > 0 for spent in found["block"]["stages"].values())
    assert all(rate > 0 for rate in found["rates"].values())
    assert found["rates"]["from_host"] != found["rates"]["copied"]
    assert found["block"]["fallbacks"] == 0
    assert 0 < found["block"]["mean_relative_error"] < 0.01
