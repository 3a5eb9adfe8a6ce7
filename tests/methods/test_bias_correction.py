"""The corrected bias is the exact minimum, for any codes; centered codes do not see a shift of the inputs."""

import numpy as np
import pytest
import torch

from quantlib.methods import METHODS
from quantlib.methods.bias_correction import exact_bias
from quantlib.schemes import scheme_from_name

ROWS, COLUMNS, TOKENS = 16, 64, 400
SCHEME = scheme_from_name("W3A16", 32)


def _problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
    mixing_CC = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64) / 8
    x_NC = x_NC @ mixing_CC + torch.randn(COLUMNS, generator=generator, dtype=torch.float64)
    weight_RC = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    return x_NC, weight_RC, torch.randn(ROWS, generator=generator)


def _quantized(weight_RC: torch.Tensor, x_NC: torch.Tensor):
    about_NC = x_NC - x_NC.mean(0)
    return METHODS["gptq"](
        {"w": weight_RC},
        {"w": SCHEME},
        hessian_CC=(about_NC.T @ about_NC).float(),
        num_tokens=TOKENS,
        scale_dtype=torch.float32,
    )["w"].quantized


@pytest.mark.parametrize("disturbance", [0.0, 0.3])
def test_corrected_bias_is_what_least_squares_gives(disturbance):
    x_NC, weight_RC, bias_R = _problem(0)
    shift_C = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    reference_NC = x_NC + disturbance * shift_C
    quantized = _quantized(weight_RC, x_NC)
    found_R = exact_bias(
        bias_R, weight_RC, quantized, mean_C=x_NC.mean(0), reference_mean_C=reference_NC.mean(0)
    )
    in_fp64 = {"mean_C": x_NC.mean(0), "reference_mean_C": reference_NC.mean(0)}
    given_R = bias_R.double()
    assert torch.equal(exact_bias(given_R, weight_RC, quantized, **in_fp64), found_R)
    assert torch.equal(given_R, bias_R.double()), "the bias that was given changed"
    wanted_NR = reference_NC.numpy() @ weight_RC.double().numpy().T + bias_R.double().numpy()
    left_NR = wanted_NR - x_NC.numpy() @ quantized.dequantize().double().numpy().T
    solved, *_ = np.linalg.lstsq(np.ones((TOKENS, 1)), left_NR, rcond=None)
    np.testing.assert_allclose(found_R.numpy(), solved[0], rtol=1e-9)
    assert np.abs(found_R.numpy() - bias_R.double().numpy()).max() > 1e-3


def test_centered_codes_do_not_see_a_shift_of_the_inputs():
    x_NC, weight_RC, _ = _problem(1)
    shifted_NC = x_NC + 5.0 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(3))
    assert torch.equal(_quantized(weight_RC, x_NC).codes_RC, _quantized(weight_RC, shifted_NC).codes_RC)
