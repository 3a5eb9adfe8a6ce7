"""Factors on a GPU: right, in place and without waiting; and solves in too little memory."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from quantlib.calibration.totals import Total, exponent_for
from quantlib.cholesky import CHOLESKYS, library_cholesky_
from quantlib.cholesky_check import check_choleskys
from quantlib.group_solver import GroupSolver
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.linalg import Factor, factor_hessian
from quantlib.memory_ladder import MemoryLadder
from quantlib.methods.target_correction import target_change
from quantlib.packing import FORMATS
from quantlib.panels import panels_of
from quantlib.schemes import scheme_from_name
from quantlib.solver_settings import DEFAULT_SOLVER
from quantlib.strided_view import StoredPart

CPU = torch.device("cpu")


def hessian(columns: int, seed: int = 0) -> torch.Tensor:
    """float64 on the CPU, of inputs that depend on each other, a few of them far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    x_NC += x_NC.roll(1, 1) + x_NC[:, :1]
    x_NC[:, :: max(1, columns // 5)] *= 30
    return x_NC.T @ x_NC


def lower(factor: Factor) -> torch.Tensor:
    """The factor by position, float64 on the CPU."""
    return (factor.feedback_CC.double() * factor.pivots_C.double()).cpu()


def peak_beside(call) -> tuple[object, int]:
    """What a call gives, and the most bytes that it held on the device at a time, its results included."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = call()
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("way", CHOLESKYS)
@pytest.mark.parametrize("columns", [1, 100, 1025, 2500])
def test_factor_is_that_of_float64_on_the_cpu(device, way, columns):
    exact_CC = hessian(columns)
    wanted = factor_hessian(exact_CC, num_tokens=2 * columns)
    found = factor_hessian(exact_CC.float().to(device), num_tokens=2 * columns, cholesky_=CHOLESKYS[way])
    assert wanted is not None and found is not None
    assert torch.equal(found.order_C.cpu(), wanted.order_C)
    assert (found.rung, found.num_attempts, found.num_dead_columns) == ("damped", 1, 0)
    # On a CPU fp32 comes within 2e-6 of the largest entry; TF32 products would stay a hundred times off.
    assert (lower(found) - lower(wanted)).abs().max() <= 2e-5 * wanted.pivots_C.max()


@pytest.mark.parametrize("way", CHOLESKYS)
def test_dead_columns_and_failed_attempts_are_seen_on_the_device(device, way):
    spoiled_CC = hessian(300)
    spoiled_CC[[7, 41]], spoiled_CC[:, [7, 41]] = 0.0, 0.0
    # Too large by a tenth for a positive definite matrix; as much damping as there is makes up for it.
    spoiled_CC[3, 2] = spoiled_CC[2, 3] = 1.1 * (spoiled_CC[2, 2] * spoiled_CC[3, 3]).sqrt()
    given = {"num_tokens": 10**9, "cholesky_": CHOLESKYS[way]}
    wanted = factor_hessian(spoiled_CC, **given)
    found = factor_hessian(spoiled_CC.float().to(device), **given)
    assert wanted is not None and found is not None
    assert (found.rung, found.num_attempts) == (wanted.rung, wanted.num_attempts) != ("damped", 1)
    assert found.num_dead_columns == 2


@pytest.mark.parametrize(("way", "share"), [("library", 1.15), ("blocked", 1.3)])
@pytest.mark.parametrize("is_spoiled", [False, True])
def test_factor_takes_one_buffer_beside_the_hessian(device, way, share, is_spoiled):
    columns = 8192
    hessian_CC = torch.eye(columns, device=device) + 0.5 / columns
    if is_spoiled:  # three attempts, each with a matrix of its own
        hessian_CC[0, 1] = hessian_CC[1, 0] = 1.02
    library_cholesky_(torch.eye(64, device=device))  # what a library sets up on first use
    found, held = peak_beside(lambda: factor_hessian(hessian_CC, num_tokens=10**9, cholesky_=CHOLESKYS[way]))
    assert isinstance(found, Factor) and (found.num_attempts > 1) == is_spoiled
    assert held <= share * hessian_CC.nbytes


def test_host_waits_three_times_for_a_factor(device):
    hessian_CC = hessian(500).float().to(device)
    factor_hessian(hessian_CC, num_tokens=1000)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            factor_hessian(hessian_CC, num_tokens=1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) <= 3


@pytest.mark.parametrize("way", CHOLESKYS)
def test_targets_are_corrected_as_on_the_cpu(device, way):
    hessian_CC, cross_CC = hessian(400), hessian(400) + 0.05 * hessian(400, seed=1)
    wanted = target_change(hessian_CC, cross_CC)
    found = target_change(hessian_CC.float().to(device), cross_CC.float().to(device), CHOLESKYS[way])
    assert (found.double().cpu() - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("way", CHOLESKYS)
# The widest linears of all have the last number.
@pytest.mark.parametrize("columns", [1000, 8192, 53248])
def test_device_passes_its_check(device, way, columns):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * 4 * columns**2:
        pytest.skip(f"needs two matrices of {columns} columns on the GPU")
    assert check_choleskys(columns, device, {way: CHOLESKYS[way]}).problems == {}


def test_check_finds_a_wrong_entry_on_the_device(device):
    def wrong(matrix_CC: torch.Tensor) -> torch.Tensor:
        status = library_cholesky_(matrix_CC)
        matrix_CC[4000, 3000] *= -1
        return status

    found = check_choleskys(5000, device, {"library": wrong, "blocked": CHOLESKYS["blocked"]})
    assert (found.way, found.problems) == ("blocked", {"library": "1 wrong entries"})


ROWS, COLUMNS, TOKENS = 16384, 1024, 2048


@pytest.fixture
def memory_limit() -> Iterator[None]:
    """What a test allows this process ends with it."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def allow(num_bytes: int) -> None:
    """Let this process have so much more than it has now."""
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / whole)


def group() -> tuple:
    """What a solver is given of one tile of one linear, beside which its factor is small."""
    linear = LinearPlan(
        name="q",
        path="q",
        rows=ROWS,
        columns=COLUMNS,
        method="gptq",
        scheme=scheme_from_name("W4A16", 128),
        corrects_bias=False,
        weight=StoredPart(tensor="q.weight"),
        weight_dtype="BF16",
    )
    block = BlockPlan(index=0, prefix="b", tensors=(), linears=(linear,), input_groups=(("q",),))
    weight_RC = 0.05 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    matrix_CC = hessian(COLUMNS).float()
    total = Total.zeros(COLUMNS, exponent_for(float(matrix_CC.abs().max()), 1))
    total.add_([matrix_CC[start:end, :end] for start, end in panels_of(COLUMNS)])
    return block, 0, {"q.weight": weight_RC.bfloat16()}, [[total], [], []], GroupTokens(own=TOKENS)


def codes_of(packed) -> torch.Tensor:
    return FORMATS["compressed-tensors"].unpack("q", packed, scheme_from_name("W4A16", 128)).codes_RC


def test_solve_in_too_little_memory_has_smaller_tiles_and_the_same_codes(device, memory_limit):
    arguments = (FORMATS["compressed-tensors"], DEFAULT_SOLVER, device)
    given = group()
    GroupSolver(*arguments).solve(*given)
    (wanted, (wanted_row,)), held = peak_beside(lambda: GroupSolver(*arguments).solve(*given))
    allow(int(0.7 * held))
    packed, (row,) = MemoryLadder(*arguments).solve(*given)
    assert row["memory_step"] == "smaller_tiles"
    assert row["relative_error"] == pytest.approx(wanted_row["relative_error"], rel=1e-4)
    # Products of other heights may be summed in another order: codes differ where a target is in the middle.
    assert (codes_of(packed) != codes_of(wanted)).float().mean() < 1e-3


def test_solve_in_no_memory_is_that_of_the_cpu(device, memory_limit):
    packer, given = FORMATS["compressed-tensors"], group()
    wanted, (wanted_row,) = GroupSolver(packer, DEFAULT_SOLVER, CPU).solve(*given)
    allow(1 << 20)
    packed, (row,) = MemoryLadder(packer, DEFAULT_SOLVER, device).solve(*given)
    assert row == {**wanted_row, "memory_step": "cpu"}
    assert all(torch.equal(packed[name], wanted[name]) for name in wanted)
