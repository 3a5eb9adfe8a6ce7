"""Solves for which the memory of a device does not suffice: the same bytes, less at a time, and told so."""

import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch

from quantlib.calibration.totals import Total, exponent_for
from quantlib.cholesky import library_cholesky_
from quantlib.group_solver import GroupSolver
from quantlib.inprocess import quantize
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.plan import BlockPlan
from quantlib.job.report_text import format_report
from quantlib.job.report_verdict import concerns
from quantlib.memory_ladder import RUNGS, MemoryLadder, descend
from quantlib.methods import METHODS, methods_with
from quantlib.packing import FORMATS
from quantlib.row_tiles import RowRun, cut_tile
from quantlib.schemes import has_own_groups, scheme_from_name
from quantlib.solver_settings import DEFAULT_SOLVER, SolverSettings
from tests.support.linear_plans import linear_plan
from tests.support.partials import gram_lower, panels_from, partial_of
from tests.support.short_memory import Shortage, factoring_in, solving_in
from tests.support.tiny_jobs import tiny_options

COLUMNS, TOKENS, HEIGHT = 96, 400, 64
COUNTED = GroupTokens(own=TOKENS)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def _block(scheme: str = "W4A16", *, corrects: bool = False) -> BlockPlan:
    named = scheme_from_name(scheme, None if has_own_groups(scheme) else 32)
    linears = tuple(
        linear_plan(name, rows, COLUMNS, named, corrects_bias=corrects)
        for name, rows in (("q", HEIGHT + 40), ("k", 24), ("v", 24))
    )
    return BlockPlan(index=0, prefix="b", tensors=(), linears=linears, input_groups=(("q", "k", "v"),))


def _tensors(block: BlockPlan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for linear in block.linears:
        found[f"{linear.name}.weight"] = (
            torch.randn(linear.rows, COLUMNS, generator=generator).bfloat16() * 0.05
        )
        found[f"{linear.name}.bias"] = torch.randn(linear.rows, generator=generator).bfloat16()
    return found


def _inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x_NC = torch.randn(TOKENS, COLUMNS, generator=generator)
    return x_NC @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 8 + 0.3


def _statistics(*, is_extended: bool = False) -> list[list[Total]]:
    if is_extended:
        partial = partial_of(_inputs(), has_sums=True)
        total = Total.zeros(COLUMNS + 1, exponent_for(partial.peak, 1))
        total.add_(partial.panels)
    else:
        product_CC = gram_lower(_inputs())
        total = Total.zeros(COLUMNS, exponent_for(float(product_CC.abs().max()), 1), is_whole=False)
        total.add_(panels_from(product_CC, is_whole=False))
    return [[total], [], []]


def _ladder(methods=METHODS, options: SolverSettings = DEFAULT_SOLVER, packer=FORMATS["compressed-tensors"]):
    return MemoryLadder(packer, options, CPU, HEIGHT, methods)


def _wanted(block: BlockPlan, options: SolverSettings = DEFAULT_SOLVER, **given):
    solver = GroupSolver(FORMATS["compressed-tensors"], options, CPU, HEIGHT)
    return solver.solve(block, 0, _tensors(block), _statistics(**given), COUNTED)


def _assert_same_but(step, found, wanted):
    """Every byte; of the figures but last bits of sums over other parts."""
    (packed, rows), (wanted_packed, wanted_rows) = found, wanted
    assert packed.keys() == wanted_packed.keys()
    assert all(torch.equal(packed[name], wanted_packed[name]) for name in packed)
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        assert wanted_row["memory_step"] is None
        for figure, value in {**wanted_row, "memory_step": step}.items():
            is_sum = "error" in figure and value is not None
            assert row[figure] == (pytest.approx(value, rel=1e-5) if is_sum else value), figure


def _in_tiles(ladder: MemoryLadder, block: BlockPlan):
    given = (_tensors(block), _statistics(), COUNTED)
    tiles = ladder.tiles(block)[0]
    assert len(tiles) == 3
    return ladder.pack(block, 0, [ladder.solve_tile(block, tile, *given) for tile in tiles], COUNTED)


# Rows that memory suffices for -> what it comes to, and how often it did not suffice for the first tile.
_BY_ROWS = {
    64: (None, 0),
    63: ("smaller_tiles", 2),
    20: ("smaller_tiles", 3),
    8: ("smaller_tiles", 4),
    7: ("cpu", 5),
}


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16_ASYM", "NVFP4A16", "FP8A16_BLOCK"])
@pytest.mark.parametrize("most_rows", _BY_ROWS)
def test_tiles_get_smaller_until_memory_suffices(scheme, most_rows):
    block, (step, num_failures) = _block(scheme), _BY_ROWS[most_rows]
    shortage = Shortage(0)
    ladder = _ladder(solving_in(shortage, most_rows))
    found = ladder.solve(block, 0, _tensors(block), _statistics(), COUNTED)
    assert shortage.num_failures == num_failures
    _assert_same_but(step, found, _wanted(block))


@pytest.mark.parametrize("most_rows", _BY_ROWS)
def test_single_tiles_begin_where_the_one_before_ended(most_rows):
    block, (step, num_failures) = _block(), _BY_ROWS[most_rows]
    shortage = Shortage(0)
    packed, rows = _in_tiles(_ladder(solving_in(shortage, most_rows)), block)
    assert shortage.num_failures == num_failures
    # Of q the first tile has as many rows as there may be; the last one, of k and v, has fewer.
    first = [{**row, "memory_step": None} for row in rows]
    _assert_same_but(None, (packed, first), _wanted(block))
    assert {row["memory_step"] for row in rows} == {step}


@pytest.mark.parametrize(
    ("num_failures", "step"), [(0, None), (1, "emptied_cache"), (2, "smaller_tiles"), (5, "cpu")]
)
@pytest.mark.parametrize("has_tiles", [False, True])
def test_factor_is_made_again_or_on_the_cpu(num_failures, step, has_tiles):
    block, shortage = _block(), Shortage(num_failures)
    ladder = _ladder(factoring_in(shortage))
    if has_tiles:
        packed, rows = _in_tiles(ladder, block)
        assert rows[0]["memory_step"] == step
        _assert_same_but(None, (packed, [{**row, "memory_step": None} for row in rows]), _wanted(block))
    else:
        found = ladder.solve(block, 0, _tensors(block), _statistics(), COUNTED)
        _assert_same_but(step, found, _wanted(block))
    assert shortage.num_failures == num_failures


def test_what_is_forgotten_is_made_again():
    block, made = _block(), []

    def cholesky_(matrix_CC: torch.Tensor) -> torch.Tensor:
        made.append(len(matrix_CC))
        return library_cholesky_(matrix_CC)

    ladder = _ladder(methods_with(cholesky_))
    tile = ladder.tiles(block)[0][0]
    for num_factors in (1, 1, 2):
        if num_factors == 2:
            ladder.forget()
        ladder.solve_tile(block, tile, _tensors(block), _statistics(), COUNTED)
        assert made == [COLUMNS] * num_factors


@pytest.mark.parametrize("options", [{"descent_passes": 1, "refits_scales": True}, {"outlier_weights": 50}])
def test_other_steps_of_a_solve_do_not_depend_on_the_height_of_tiles(options):
    block, settings = _block(), SolverSettings(**options)
    ladder = _ladder(solving_in(Shortage(0), 16), settings)
    found = ladder.solve(block, 0, _tensors(block), _statistics(), COUNTED)
    _assert_same_but("smaller_tiles", found, _wanted(block, settings))


@pytest.mark.parametrize("most_rows", [16, 2])
def test_group_with_biases_takes_the_same_steps(most_rows):
    block = _block(corrects=True)
    ladder = _ladder(solving_in(Shortage(0), most_rows))
    found = ladder.solve(block, 0, _tensors(block), _statistics(is_extended=True), COUNTED)
    step = {16: "smaller_tiles", 2: "cpu"}[most_rows]
    _assert_same_but(step, found, _wanted(block, is_extended=True))


@pytest.mark.parametrize(("most_rows", "step"), [(40, "smaller_tiles"), (1, "cpu")])
def test_batch_that_takes_too_much_is_solved_one_by_one(most_rows, step):
    named = scheme_from_name("W4A16", 32)
    groups = tuple((f"{expert}.up",) for expert in range(3))
    linears = tuple(linear_plan(name, 40, COLUMNS, named) for (name,) in groups)
    block = BlockPlan(index=0, prefix="b", tensors=(), linears=linears, input_groups=groups)
    shortage = Shortage(0)
    given = (_tensors(block), [_statistics()] * 3, [COUNTED] * 3)
    found = _ladder(solving_in(shortage, most_rows)).solve_batch(block, [0, 1, 2], *given)
    for made, wanted in zip(found, _ladder().solve_batch(block, [0, 1, 2], *given), strict=True):
        _assert_same_but(step, made, wanted)


def test_codes_are_packed_on_the_cpu_at_last():
    block, shortage = _block(), Shortage(2)
    plain = FORMATS["compressed-tensors"]
    names = ("NAME", "scale_dtype", "packed_names")

    def pack(name, quantized):
        shortage.take()
        return plain.pack(name, quantized)

    packer = SimpleNamespace(pack=pack, **{name: getattr(plain, name) for name in names})
    found = _in_tiles(_ladder(packer=packer), block)
    _assert_same_but("cpu", found, _wanted(block))
    assert shortage.num_failures == 2


def test_failed_attempt_holds_nothing_when_the_next_begins():
    made = []

    def attempt(rung):
        assert all(reference() is None for reference in made)
        tensor = torch.empty(4)
        made.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        descend(attempt, RUNGS)
    assert len(made) == len(RUNGS)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_what_libraries_say_of_too_little_memory_is_tried_again(message):
    calls = []

    def attempt(rung):
        calls.append(rung)
        if len(calls) == 1:
            raise RuntimeError(message)
        return "found"

    assert descend(attempt, RUNGS) == ("found", RUNGS[1])


def test_other_errors_are_not_tried_again():
    calls = []

    def attempt(rung):
        calls.append(rung)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        descend(attempt, RUNGS)
    assert len(calls) == 1


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [(1,), (5, 64), (512,), (100, 28, 300), (3, 3, 3)])
def test_cut_tile_has_all_rows_once_and_fewer_at_a_time(rows, pieces):
    tile = tuple(RowRun(str(n), 32 * n, 32 * n + count) for n, count in enumerate(rows))
    cut = cut_tile(tile, pieces)
    for run in tile:
        parts = [(part.start, part.end) for piece in cut for part in piece if part.name == run.name]
        assert [place for start, end in parts for place in range(start, end)] == list(
            range(run.start, run.end)
        )
    most = max(sum(run.rows for run in piece) for piece in cut)
    assert most <= math.ceil(sum(rows) / pieces)


def test_run_tells_of_every_linear_and_counts_them(tmp_path, monkeypatch):
    plain = quantize(tiny_options(tmp_path / "plain"))
    # The first group of the first block ends with smaller tiles; all others have what they need.
    monkeypatch.setitem(METHODS, "gptq", factoring_in(Shortage(3))["gptq"])
    report = quantize(tiny_options(tmp_path / "short"))
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    short = [linear["name"] for linear in linears if linear["memory_step"]]
    assert 0 < len(short) < len(linears)
    assert report["memory"]["steps"] == {"smaller_tiles": len(short)}
    assert plain["memory"]["steps"] == {}
    assert [x["sha256"] for x in report["shards"]] == [x["sha256"] for x in plain["shards"]]
    assert report["fallbacks"] == plain["fallbacks"] and concerns(report) == concerns(plain)
    stored = json.loads((tmp_path / "short" / "output" / "quantmill_report.json").read_text())
    assert stored["memory"]["steps"] == report["memory"]["steps"]
    words = f"memory of a device did not suffice for linears that were solved in smaller tiles: {len(short)}"
    assert words in format_report(report) and words not in format_report(plain)
    assert words[1:] in (tmp_path / "short" / "output" / "quantmill_report.html").read_text()
