"""The floor of a block counts what it must, its stages are all measured, and little has to be installed."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quantlib import linalg
from quantlib.calibration.totals import Total
from quantlib.cholesky import blocked_cholesky_
from quantlib.job.bands import sum_shapes
from quantlib.methods import gptq, methods_with
from quantlib.methods.whole_solve import Method
from quantlib.model.skeleton import load_skeleton
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
    import block_tables
    import block_targets

    found = (block_floor, block_models, block_plan, block_run, block_solve, block_stopwatch, block_tables)
    yield {module.__name__: module for module in (*found, block_targets)}
    sys.path.remove(str(BLOCK.parent))


def run_without_packages(*arguments: str) -> str:
    command = [sys.executable, "-c", PROGRAM, str(BLOCK), ",".join(ABSENT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def counted_methods() -> tuple[Mapping[str, Method], list[int]]:
    """Methods that make factors in the way that is not the first choice, and the columns of those made."""
    made: list[int] = []

    def cholesky_(matrix_CC: torch.Tensor) -> torch.Tensor:
        made.append(len(matrix_CC))
        return blocked_cholesky_(matrix_CC)

    return methods_with(cholesky_), made


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


def test_sustained_rate_is_that_of_calls_after_a_warm_up_and_burst_the_best_before(modules):
    now = 0.0
    made = 0

    def call() -> None:
        nonlocal now, made
        made += 1
        # Setting up, a few quick calls, and then the pace that is kept.
        now += 9.0 if made == 1 else 0.25 if made < 10 else 0.5

    found = modules["block_floor"].seconds_of_calls(torch.device("cpu"), call, 8.0, clock=lambda: now)
    assert found == (0.25, 0.5)
    # After six calls as many as make 8 s at a quarter each, twice.
    assert made == 6 + 2 * 32
    made = 0
    assert modules["block_floor"].seconds_of_calls(torch.device("cpu"), call, 0.0, clock=lambda: now) == (
        0.25,
        0.25,
    )
    assert made == 6


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
    share = 1 / parts["statistics"]["times_floor"]
    assert f"\nstatistics: {share:.0%} of the sustained rate of " in printed
    assert f"\nblock: {block['block']['times_floor']:.2f} x its floor" in printed
    # Of a CPU there is no check, and calls are long enough to be at the rate that it keeps.
    assert found["cholesky_check"] is None
    assert found["burst_rates"] == found["rates"]


def test_block_of_experts_is_the_same_in_any_number_of_passes(modules):
    models = modules["block_models"]
    model = models.tiny_model(models.block_model("deepseek-v3-experts"))
    errors = []
    rates = modules["block_floor"].Rates(bf16=2.0, fp32=2.0, copied=1.0, from_host=1.0, to_host=1.0)
    for passes in (1, 3):
        watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
        request = modules["block_plan"].BlockRequest(
            model=model, device="cpu", sequences=1, sequence_length=256, passes=passes
        )
        with watch.watching():
            plan, linears = modules["block_run"].run_request(request, watch)
        assert watch.stages["capture"].calls == passes
        figures = modules["block_tables"].block_figures(request, plan, shape_of(model), rates, watch, linears)
        parts = {part["part"]: part for part in figures["parts"]}
        # Every pass takes the forward, of which one is needed.
        needed = {"forward": 1 / passes, "statistics": 1.0}
        for part, share in needed.items():
            assert parts[part]["floor_s"] * 2.0 == pytest.approx(share * parts[part]["flops"])
        errors.append({row["name"]: row["relative_error"] for row in linears})
    # 16 experts, a shared one, and latent attention.
    assert len(errors[0]) == 3 * 17 + 5
    assert errors[0] == errors[1]


def test_only_first_linears_of_experts_are_solved_with_sums_of_all_tokens(modules):
    models = modules["block_models"]
    model = models.tiny_model(models.block_model("deepseek-v3-experts"))
    request = modules["block_plan"].BlockRequest(model=model, device="cpu", sequences=1, sequence_length=64)
    skeleton = load_skeleton(model.config, list(models.stored_shapes(model.config)))
    plan = modules["block_plan"].block_plan(request, skeleton, "/")
    names = plan.blocks[0].input_groups
    groups = tuple(range(len(names)))
    totals = [Total.zeros(shape.columns, 0) for shape in sum_shapes(plan, 0, groups)]
    given = modules["block_run"].sums_of(plan, groups, totals)
    first = [group for group in groups if ".experts." in names[group][0] and len(names[group]) == 2]
    assert len(first) == 16
    (pool,) = totals[len(groups) :]
    assert given == {group: ([totals[group]], [], [pool] if group in first else []) for group in groups}


def test_methods_and_height_that_are_given_solve_a_block(modules):
    models = modules["block_models"]
    model = models.tiny_model(models.block_model("llama-3.1-70b"))
    request = modules["block_plan"].BlockRequest(
        model=model, device="cpu", sequences=1, sequence_length=64, height=256
    )
    methods, made = counted_methods()
    watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
    with watch.watching({"columns": modules["block_stopwatch"].WATCHED["columns"]}):
        modules["block_run"].run_request(request, watch, methods)
    assert made == [512, 512, 512, 1024]
    # Rows of q, k and v 512 + 256 + 256, of o 512, of gate and up 1024 each, of down 512.
    assert watch.parts["solve", "columns"].calls == (2 + 1 + 1) + 2 + (4 + 4) + 2


def test_methods_and_height_that_are_given_solve_a_weight(modules):
    problem = modules["block_solve"].solve_problem(64, 128, device=torch.device("cpu"), group_size=32)
    rates = modules["block_floor"].Rates(bf16=1.0, fp32=1.0, copied=1.0, from_host=1.0, to_host=1.0)
    methods, made = counted_methods()
    watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"))
    with watch.watching():
        modules["block_solve"].our_row(problem, watch, rates, methods=methods, height=16)
    assert made == [128]
    assert watch.parts["solve", "columns"].calls == 4


def test_whole_solve_is_measured_against_what_is_wanted_only_in_that_size(modules):
    targets = modules["block_targets"]
    kind = {"times_floor": 1.0, "error": 0.01, "device_bytes": 1, "said": ""}
    rows = [
        {"tool": "Quantmill", "rows": rows, "columns": columns, "seconds": 1.5, **kind}
        for rows, columns in ((28672, 8192), (8192, 28672))
    ]
    parts = [{"columns": 1.0, "weight energy": 0.125, "error energy": 0.25}] * 2
    (_, line) = targets.solve_targets({"rows": rows, "our_parts": parts})
    assert line.startswith("solve of 8192 x 28672 with its factor: 1.12 s, with the energies")
    assert "of the report 1.50 s" in line
    assert targets.solve_targets({"rows": rows[:1], "our_parts": parts[:1]}) == []


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
        errors.append(modules["block_solve"].our_row(problem, watch, rates, settings=settings).error)
    # What passes of descent are for.
    assert errors[1] < errors[0]


def test_part_is_without_the_parts_inside_it(modules, monkeypatch):
    example = ModuleType("quantlib.example")
    example.inner = lambda: None
    example.outer = lambda: (example.inner(), example.inner())
    monkeypatch.setitem(sys.modules, example.__name__, example)
    # A clock that goes on by a second whenever somebody looks at it.
    watch = modules["block_stopwatch"].Stopwatch(torch.device("cpu"), clock=partial(next, count()))
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
    for kind in ("rates", "burst_rates"):
        assert all(rate > 0 for rate in found[kind].values())
    assert found["cholesky_check"]["columns"] == 1536
    assert found["rates"]["from_host"] != found["rates"]["copied"]
    assert found["block"]["fallbacks"] == 0
    assert 0 < found["block"]["mean_relative_error"] < 0.01
