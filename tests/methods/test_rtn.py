"""Round to nearest: codes, reports, and that a Hessian changes only the reported error."""

import pytest
import torch

from quantlib import grouping
from quantlib.errors import NumericsError
from quantlib.methods import METHODS
from quantlib.methods.rtn import prepare
from quantlib.schemes import INTEGER_NAMES, WHOLE_ROW, scheme_from_name
from quantlib.solver_settings import SolverSettings

rtn = METHODS["rtn"]


def weight(rows=24, columns=160, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", INTEGER_NAMES)
def test_rtn_every_code_is_the_nearest_level(name):
    scheme, w = scheme_from_name(name, 64), weight()
    quantized = rtn({"w": w}, {"w": scheme}, hessian_CC=None, num_tokens=0, scale_dtype=torch.float16)[
        "w"
    ].quantized
    scale = quantized.scale_RG.double().repeat_interleave(64, 1)[:, :160, None]
    zero = 2 ** (scheme.bits - 1)
    zero = (
        zero
        if quantized.zero_RG is None
        else quantized.zero_RG.double().repeat_interleave(64, 1)[:, :160, None]
    )
    levels = (torch.arange(scheme.num_codes).double() - zero) * scale
    nearest = (levels - w.double()[:, :, None]).abs().amin(2)
    chosen = (quantized.dequantize().double() - w.double()).abs()
    torch.testing.assert_close(chosen, nearest, atol=1e-9, rtol=0)


def test_rtn_report_without_hessian_is_unweighted():
    w, scheme = weight(), scheme_from_name("W4A16", 64)
    found = rtn({"w": w}, {"w": scheme}, hessian_CC=None, num_tokens=0, scale_dtype=torch.bfloat16)["w"]
    error = w.double() - found.quantized.dequantize().double()
    report = found.report.to_dict()
    assert report.pop("relative_error") == pytest.approx(
        (error.square().sum() / w.double().square().sum()).item()
    )
    assert 0 <= report.pop("clipped_fraction") < 0.1
    assert report == {
        "name": "w",
        "method": "rtn",
        "bits": 4,
        "predicted_error": None,
        "damping_fraction": 0.0,
        "damping_attempts": 0,
        "tokens": 0,
        "dead_columns": 0,
        "bounded_scales": 0,
        "fallback": None,
        "bias_change": None,
        "shared_tokens": None,
        "dropped_tokens": None,
        "outlier_columns": None,
        "kept_weights": 0,
        "memory_step": None,
    }


def test_rtn_hessian_weighs_the_report_and_touches_no_code():
    w, scheme = weight(columns=64), scheme_from_name("W4A16", 64)
    h = torch.diag(torch.arange(64.0))
    plain = rtn({"w": w}, {"w": scheme}, hessian_CC=None, num_tokens=0, scale_dtype=torch.bfloat16)["w"]
    found = rtn({"w": w}, {"w": scheme}, hessian_CC=h, num_tokens=99, scale_dtype=torch.bfloat16)["w"]
    assert torch.equal(plain.quantized.codes_RC, found.quantized.codes_RC)
    assert torch.equal(plain.quantized.scale_RG, found.quantized.scale_RG)
    error = (w - found.quantized.dequantize()).double().square() @ h.diagonal().double()
    wanted = error.sum() / (w.double().square() @ h.diagonal().double()).sum()
    assert found.report.relative_error == pytest.approx(wanted.item(), rel=1e-5)
    assert (found.report.tokens, found.report.dead_columns) == (99, 1)


def test_rtn_counts_bounded_scales():
    w = weight(4, 128)
    w[:, 64:] *= 1e-9
    found = rtn(
        {"w": w},
        {"w": scheme_from_name("W4A16", 64)},
        hessian_CC=None,
        num_tokens=0,
        scale_dtype=torch.float16,
    )["w"]
    assert found.report.bounded_scales == 4


def test_rtn_weight_of_zeros_has_no_error():
    found = rtn(
        {"w": torch.zeros(4, 64)},
        {"w": scheme_from_name("W4A16", 64)},
        hessian_CC=torch.eye(64),
        num_tokens=5,
        scale_dtype=torch.bfloat16,
    )["w"]
    assert found.report.relative_error == 0.0
    assert (found.quantized.dequantize() == 0).all()


def round_rows(w, scheme, *, scale_search="minmax", hessian=None):
    solver = SolverSettings(scale_search=scale_search)
    rounding = prepare(hessian_CC=hessian, cross_CC=None, num_tokens=0, solver=solver)
    return rounding.solve({"w": w}, scheme, scale_dtype=torch.bfloat16)["w"]


@pytest.mark.parametrize("name", INTEGER_NAMES)
@pytest.mark.parametrize("columns", [128, 90])
def test_rtn_energies_and_clipped_weights_equal_those_in_float64(name, columns, monkeypatch):
    monkeypatch.setattr(grouping, "_CPU_ELEMENTS", 7 * columns)
    w, scheme = weight(columns=columns).bfloat16(), scheme_from_name(name, 32)
    solved = round_rows(w, scheme)
    exact, codes = w.double(), solved.quantized.codes_RC.double()
    scale = solved.quantized.scale_RG.double().repeat_interleave(32, 1)[:, :columns]
    zero = 2.0 ** (scheme.bits - 1)
    if solved.quantized.zero_RG is not None:
        zero = solved.quantized.zero_RG.double().repeat_interleave(32, 1)[:, :columns]
    error = exact - scale * (codes - zero)
    assert solved.weight_energy == pytest.approx(exact.square().sum().item(), rel=1e-6)
    assert solved.error_energy == pytest.approx(error.square().sum().item(), rel=1e-6)
    assert solved.num_clipped == int((error.abs() > scale / 2).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rtn_absmax_in_whole_rows_of_8_bits_is_absmax_int8(dtype):
    w = weight().to(dtype)
    found = round_rows(w, scheme_from_name("W8A16", WHOLE_ROW), scale_search="absmax").quantized
    absmax = w.double().abs().amax(1, keepdim=True)
    assert torch.equal(found.scale_RG, (absmax / 127).float().bfloat16())
    codes = (w.double() / found.scale_RG.double()).round().clamp(-127, 127)
    assert torch.equal(found.codes_RC.double() - 128, codes)
    # bitsandbytes keeps absmax and rounds 127 * w / absmax; a bf16 scale is off by 2**-9 at most.
    assert ((127 * w.double() / absmax).round() - codes).abs().max() <= 1


@pytest.mark.parametrize("scale_search", ["minmax", "mse"])
def test_rtn_weights_whose_squares_overflow_get_the_same_codes(scale_search):
    w, scheme = weight(), scheme_from_name("W4A16", 32)
    found, wanted = (round_rows(x, scheme, scale_search=scale_search) for x in (w * 2.0**100, w))
    assert torch.equal(found.quantized.codes_RC, wanted.quantized.codes_RC)


@pytest.mark.parametrize("scale_search", ["minmax", "mse"])
@pytest.mark.parametrize("hessian", [None, torch.diag(torch.arange(160.0))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_rtn_rows_with_a_weight_that_is_not_finite_are_refused(value, dtype, hessian, scale_search):
    w = weight().to(dtype)
    w[3, 0] = value  # a column that the Hessian does not count
    with pytest.raises(NumericsError, match="w: weights must be finite"):
        round_rows(w, scheme_from_name("W4A16", 32), scale_search=scale_search, hessian=hessian)
