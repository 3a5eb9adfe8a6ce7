"""CPU seconds of the stages of a solve, on the shapes of a small language model.

    python tests/benchmarks/solver.py [--threads 1] [--repeats 3]
    python tests/benchmarks/solver.py --baseline 4096
    python tests/benchmarks/solver.py --experts 8

Each figure is the least of the repeats. Inputs are random, correlated and uneven like activations. With
``--baseline`` the column loop of one square matrix in groups of 128 runs beside the eager forms of
`eager_columns`, once each; their codes are compared. With ``--experts`` the experts of small models are
solved one after the other and as rows of one matrix with one factor: what solving experts of unlike inputs as
one batch could gain at most, as it would need more products besides.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from eager_columns import column_by_column, in_batches, inverse_factor

from quantlib.calibration.totals import Total, exponent_for, matrix_from
from quantlib.grids.affine import AffineGrid, with_codes
from quantlib.grids.fit import search_scales
from quantlib.linalg import Factor, factor_hessian, inverse_diagonal
from quantlib.methods import METHODS
from quantlib.methods.column_solver import solve_codes
from quantlib.methods.coordinate_descent import descend
from quantlib.methods.measures import relative_error
from quantlib.methods.scale_refit import refit_scales
from quantlib.schemes import scheme_from_name
from tests.support.partials import gram_lower, partial_of

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
# Gate and up on top of each other, and down, of Granite-3.0-1B-A400M, Qwen3-30B-A3B and OLMoE-1B-7B.
EXPERT_SHAPES = ((1024, 1024), (1024, 512), (1536, 2048), (2048, 768), (2048, 2048), (2048, 1024))
TOKENS_PER_CELL = 4096


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Least CPU time of the process over some calls."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def activations(columns: int, rows: int = TOKENS_PER_CELL) -> torch.Tensor:
    """Inputs, fp32 [rows, C]; by default those of one cell."""
    generator = torch.Generator().manual_seed(columns)
    x_NC = torch.randn(rows, columns, generator=generator)
    x_NC *= torch.exp(torch.randn(columns, generator=generator))
    return x_NC + x_NC.roll(1, dims=1)


def statistics_seconds(columns: int, repeats: int) -> dict[str, float]:
    """Stages that depend on the number of columns only."""
    x_NC = activations(columns)
    partial = partial_of(x_NC)
    exponent = exponent_for(partial.peak, 2 * repeats)
    total = Total.zeros(columns, exponent)
    found = {
        "Partial.add_ fp32": cpu_seconds(lambda: partial_of(x_NC), repeats),
        "Partial.add_ bf16": cpu_seconds(lambda: partial_of(x_NC.bfloat16()), repeats),
        "Total.add_": cpu_seconds(lambda: total.add_(partial.panels), repeats),
        "matrix_from": cpu_seconds(lambda: matrix_from([total]), repeats),
    }
    hessian_CC = matrix_from([total])
    found["factor_hessian"] = cpu_seconds(lambda: factor_hessian(hessian_CC, num_tokens=32768), repeats)
    return found


def solve_seconds(rows: int, columns: int, scheme_name: str, repeats: int) -> dict[str, float]:
    """Stages of the solve of one matrix."""
    scheme = scheme_from_name(scheme_name, 64)
    gram_CC = gram_lower(activations(columns)).tril()
    hessian_CC = gram_CC + gram_CC.tril(-1).T
    factor = factor_hessian(hessian_CC, num_tokens=32768)
    if factor is None:
        raise SystemExit("the benchmark's Hessian could not be factored")
    weight_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02

    def search() -> object:
        return search_scales(
            weight_RC, scheme, scale_dtype=torch.bfloat16, importance_C=hessian_CC.diagonal()
        )

    grid = search_scales(weight_RC, scheme, scale_dtype=torch.bfloat16, importance_C=hessian_CC.diagonal())
    codes_RC, _ = solve_codes(weight_RC, grid, factor)
    quantized = with_codes(grid, codes_RC)
    problem = (weight_RC, codes_RC, grid, hessian_CC)

    def one_pass() -> object:
        return descend(*problem, damping=factor.damping, order_C=factor.order_C)

    return {
        "search_scales": cpu_seconds(search, repeats),
        "solve_codes": cpu_seconds(lambda: solve_codes(weight_RC, grid, factor), repeats),
        "descend, a pass": cpu_seconds(one_pass, repeats),
        "refit_scales": cpu_seconds(lambda: refit_scales(*problem, damping=factor.damping), repeats),
        "inverse_diagonal": cpu_seconds(lambda: inverse_diagonal(factor), repeats),
        "relative_error": cpu_seconds(lambda: relative_error(weight_RC, quantized, hessian_CC), repeats),
        "gptq in all": cpu_seconds(
            lambda: METHODS["gptq"](
                {"w": weight_RC},
                {"w": scheme},
                hessian_CC=hessian_CC,
                num_tokens=32768,
                scale_dtype=torch.bfloat16,
            ),
            repeats,
        ),
    }


def prepared(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, AffineGrid, Factor]:
    """A weight [R, C], a Hessian [C, C] of twice as many tokens, scales in groups of 128, the factor."""
    gram_CC = gram_lower(activations(columns, rows=2 * columns)).tril()
    hessian_CC = gram_CC + gram_CC.tril(-1).T
    weight_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    grid = search_scales(
        weight_RC,
        scheme_from_name("W4A16", 128),
        scale_dtype=torch.bfloat16,
        importance_C=hessian_CC.diagonal(),
    )
    factor = factor_hessian(hessian_CC, num_tokens=2 * columns)
    if factor is None:
        raise SystemExit("the benchmark's Hessian could not be factored")
    return weight_RC, hessian_CC, grid, factor


def measure_experts(count: int, repeats: int) -> None:
    """The column loop for some experts, alone and on top of each other."""
    for rows, columns in EXPERT_SHAPES:
        weight_RC, _, grid, factor = prepared(rows * count, columns)
        parts = [slice(start, start + rows) for start in range(0, rows * count, rows)]
        alone = [(weight_RC[part], grid.rows(part), factor) for part in parts]

        def one_after_the_other(alone=alone) -> None:
            for expert in alone:
                solve_codes(*expert)

        stacked = (weight_RC, grid, factor)
        one = cpu_seconds(one_after_the_other, repeats)
        together = cpu_seconds(lambda stacked=stacked: solve_codes(*stacked), repeats)
        print(f"{f'[{rows}, {columns}]':14} {one:.3f} CPU s {together:.3f} {together / one:6.2f} x")


def measure_baseline(size: int) -> None:
    """The column loop beside eager ones, on the same grids."""
    weight_RC, hessian_CC, grid, factor = prepared(size, size)
    order_C = factor.order_C.flip(0)
    damped_CC = hessian_CC[order_C][:, order_C]
    damped_CC.diagonal().add_(factor.damping)
    upper_CC = inverse_factor(damped_CC)
    scale_RC = grid.scale_RG.float().repeat_interleave(128, dim=1)
    ordered = (weight_RC[:, order_C].contiguous(), scale_RC[:, order_C].contiguous(), upper_CC)
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        codes_RC, _ = solve_codes(weight_RC, grid, factor)
        found["solve_codes"] = with_codes(grid, codes_RC).dequantize()[:, order_C]

    def eager(name: str, form: Callable[..., torch.Tensor]) -> None:
        found[name] = form(*ordered)

    def product() -> None:
        torch.mm(weight_RC[:, : size // 2], hessian_CC[: size // 2])

    spent = {"products of the loop alone": cpu_seconds(product, 3), "solve_codes": cpu_seconds(ours, 3)}
    spent["eager, in batches"] = cpu_seconds(lambda: eager("eager, in batches", in_batches), 1)
    spent["eager, column by column"] = cpu_seconds(
        lambda: eager("eager, column by column", column_by_column), 1
    )
    for name, seconds in spent.items():
        same = ""
        if name in found:
            same = f"  {(found[name] == found['solve_codes']).double().mean().item():8.2%} of the codes"
        print(f"{name:28} {seconds:9.2f} CPU s {seconds / spent['solve_codes']:8.2f} x{same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--baseline", type=int, metavar="SIZE", help="compare the column loop with eager ones"
    )
    parser.add_argument("--experts", type=int, metavar="COUNT", help="solve so many experts as one matrix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.experts:
        measure_experts(arguments.experts, arguments.repeats)
        return
    if arguments.baseline:
        measure_baseline(arguments.baseline)
        return
    for columns in (576, 1536):
        for stage, seconds in statistics_seconds(columns, arguments.repeats).items():
            print(f"{f'[{TOKENS_PER_CELL}, {columns}]':14} {stage:18} {seconds:.4f}")
    for scheme_name in ("W4A16", "W4A16_ASYM"):
        for rows, columns in SHAPES:
            for stage, seconds in solve_seconds(rows, columns, scheme_name, arguments.repeats).items():
                print(f"{f'[{rows}, {columns}]':14} {scheme_name:11} {stage:18} {seconds:.4f}")


if __name__ == "__main__":
    main()
