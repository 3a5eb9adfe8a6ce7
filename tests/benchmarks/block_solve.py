"""Factor and solve of single weights, ours and other tools' on the same weight and inputs.

R rows (out features), C columns (in features), N tokens.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from block_floor import Rates, synchronize
from block_models import column_sizes, heavy_tailed
from block_peers import PEERS
from block_stopwatch import Stopwatch

from quantlib.calibration.partials import Partial
from quantlib.calibration.totals import Total, exponent_for, matrix_from
from quantlib.methods import METHODS
from quantlib.methods.whole_solve import Method
from quantlib.schemes import scheme_from_name
from quantlib.solver_settings import DEFAULT_SOLVER, SolverSettings

# Tokens for every column: enough for a Hessian of full rank.
_TOKENS_PER_COLUMN = 2
_DRAWN_TOKENS = 4096
_MEASURED_ROWS = 1024
_WEIGHT = "weight"
OURS = "Quantmill"
# The stage, of which the parts are told, of our own solve.
SOLVE = "solve"


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveRow:
    """A solver on a weight.

    Attributes:
        tool: Whose.
        rows: Of the weight.
        columns: Of the weight.
        seconds: From weight and Hessian to codes; None where it is not here or failed.
        times_floor: Of factor and products at the rate of fp32 products.
        error: tr(E H E^T) / tr(W H W^T); None likewise.
        device_bytes: Most memory of a GPU in use meanwhile.
        said: Why there are no figures.
    """

    tool: str
    rows: int
    columns: int
    seconds: float | None = None
    times_floor: float | None = None
    error: float | None = None
    device_bytes: int | None = None
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveProblem:
    """A weight, what it reads, and how it is to be stored."""

    weight_RC: torch.Tensor
    x_NC: torch.Tensor
    hessian_CC: torch.Tensor
    group_size: int


def solve_problem(
    rows: int, columns: int, *, device: torch.device, group_size: int, tokens: int | None = None
) -> SolveProblem:
    """A random one: bf16 weight of the spread of trained ones, bf16 inputs of very uneven columns.

    Args:
        tokens: By default twice the columns.
    """
    generator = torch.Generator(device).manual_seed(rows + columns)
    weight_RC = torch.randn(rows, columns, device=device, generator=generator).mul_(0.02).bfloat16()
    count = tokens or _TOKENS_PER_COLUMN * columns
    x_NC = torch.empty(count, columns, dtype=torch.bfloat16, device=device)
    size_C = column_sizes(columns, generator)
    partial = Partial(columns, device=device)
    for part_NC in x_NC.split(_DRAWN_TOKENS):
        partial.add_(part_NC.copy_(heavy_tailed(len(part_NC), size_C, generator)))
    total = Total.zeros(columns, exponent_for(partial.peak, 1), device=device)
    total.add_(partial.panels)
    hessian_CC = matrix_from([total], device=device)
    return SolveProblem(weight_RC=weight_RC, x_NC=x_NC, hessian_CC=hessian_CC, group_size=group_size)


def solve_floor(rows: int, columns: int, rates: Rates) -> float:
    """Seconds of a factor and the products of a solve."""
    return (columns**3 / 3 + rows * columns**2) / rates.fp32


def our_row(
    problem: SolveProblem,
    watch: Stopwatch,
    rates: Rates,
    *,
    settings: SolverSettings = DEFAULT_SOLVER,
    methods: Mapping[str, Method] = METHODS,
    height: int | None = None,
) -> SolveRow:
    """Our solver, with the search for scales and the figures of its report.

    Args:
        watch: A new one.
        methods: Name -> method, on the device of the problem.
        height: Most rows of a tile; None for the product's choice.
    """
    scheme = scheme_from_name("W4A16", problem.group_size)
    rows, columns = problem.weight_RC.shape
    with watch.stage(SOLVE), torch.inference_mode():
        result = methods["gptq"](
            {_WEIGHT: problem.weight_RC},
            {_WEIGHT: scheme},
            hessian_CC=problem.hessian_CC,
            num_tokens=len(problem.x_NC),
            scale_dtype=torch.bfloat16,
            solver=settings,
            height=height,
        )[_WEIGHT]
    spent = watch.stages[SOLVE]
    return SolveRow(
        tool=OURS,
        rows=rows,
        columns=columns,
        seconds=spent.seconds,
        times_floor=spent.seconds / solve_floor(rows, columns, rates),
        error=relative_error(problem, result.quantized.dequantize()),
        device_bytes=spent.device_bytes,
    )


def peer_row(tool: str, problem: SolveProblem, rates: Rates, *, repeats: int) -> SolveRow:
    """Another tool's solver.

    Args:
        repeats: Calls, of which the last one counts.
    """
    rows, columns = problem.weight_RC.shape
    place: dict[str, Any] = {"tool": tool, "rows": rows, "columns": columns}
    try:
        seconds, levels_RC, device_bytes = [_peer_solve(tool, problem) for _ in range(repeats)][-1]
    except ImportError as error:
        return SolveRow(**place, said=f"not here: {error}")
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in another tool, the table goes on
        return SolveRow(**place, said=f"failed: {type(error).__name__}: {str(error)[:200]}")
    return SolveRow(
        **place,
        seconds=seconds,
        times_floor=seconds / solve_floor(rows, columns, rates),
        error=relative_error(problem, levels_RC),
        device_bytes=device_bytes,
    )


def _peer_solve(tool: str, problem: SolveProblem) -> tuple[float, torch.Tensor, int | None]:
    """Seconds of a call, the levels, and most memory of a GPU in use meanwhile."""
    given = (problem.weight_RC, problem.x_NC, problem.hessian_CC)
    solve = PEERS[tool](*given, bits=4, group_size=problem.group_size)
    device, is_gpu = problem.weight_RC.device, problem.weight_RC.is_cuda
    synchronize(device)
    if is_gpu:  # what was held for its preparation does not count
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    with torch.no_grad():
        levels_RC = solve()
    synchronize(device)
    seconds = time.perf_counter() - started
    return seconds, levels_RC, torch.cuda.max_memory_allocated(device) if is_gpu else None


def relative_error(problem: SolveProblem, levels_RC: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) of any levels [R, C]; products in fp32, sums in float64."""
    error, whole = 0.0, 0.0
    rows = zip(problem.weight_RC.split(_MEASURED_ROWS), levels_RC.split(_MEASURED_ROWS), strict=True)
    for weight_rC, its_levels_rC in rows:
        exact_rC = weight_rC.float()
        error += _energy(exact_rC - its_levels_rC.to(exact_rC), problem.hessian_CC)
        whole += _energy(exact_rC, problem.hessian_CC)
    return error / whole


def _energy(x_RC: torch.Tensor, hessian_CC: torch.Tensor) -> float:
    return torch.sum((x_RC @ hessian_CC) * x_RC, dtype=torch.float64).item()
