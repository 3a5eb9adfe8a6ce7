"""Corrected targets against the closed form in float64, and what they are for."""

import numpy as np
import pytest
import torch

from quantlib.errors import NumericsError
from quantlib.methods import METHODS, target_correction
from quantlib.methods.target_correction import corrected_weight, target_change
from quantlib.schemes import WeightScheme
from tests.support.reference_solver import correlated_inputs

TOKENS, COLUMNS = 600, 48


def inputs(seed=0):
    """Inputs of the original model, and what quantized blocks before make of them: drifted and noisy."""
    reference = correlated_inputs(TOKENS, COLUMNS, seed)
    rng = np.random.default_rng(seed + 1)
    drift = np.eye(COLUMNS) + 0.1 * rng.normal(size=(COLUMNS, COLUMNS)) / COLUMNS**0.5
    return reference, reference @ drift + 0.05 * reference.std() * rng.normal(size=reference.shape)


def moments(reference, x):
    return torch.from_numpy(x.T @ x).float(), torch.from_numpy(reference.T @ x).float()


def weight(rows=16, seed=3):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, COLUMNS)) * 0.1).float()


def test_correction_equals_its_closed_form():
    reference, x = inputs()
    w = weight()
    found = corrected_weight(w, target_change(*moments(reference, x)))
    h = x.T @ x
    damped = h + h.diagonal().mean() * np.eye(COLUMNS)
    wanted = w.double().numpy() @ (np.eye(COLUMNS) + 0.5 * (reference - x).T @ x @ np.linalg.inv(damped))
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-6)


def test_correction_in_full_and_undamped_is_least_squares(monkeypatch):
    monkeypatch.setattr(target_correction, "_STRENGTH", 1.0)
    monkeypatch.setattr(target_correction, "_DAMPING", 1e-6)
    reference, x = inputs(seed=5)
    w = weight()
    found = corrected_weight(w, target_change(*moments(reference, x)))
    wanted, *_ = np.linalg.lstsq(x, reference @ w.double().numpy().T, rcond=None)
    np.testing.assert_allclose(found.numpy(), wanted.T, atol=2e-3)


def test_correction_of_undisturbed_inputs_changes_next_to_nothing():
    reference, _ = inputs()
    w = weight()
    found = corrected_weight(w, target_change(*moments(reference, reference)))
    torch.testing.assert_close(found, w, atol=1e-7, rtol=0)


def test_correction_brings_codes_closer_to_the_original_outputs():
    reference, x = inputs()
    hessian_CC, cross_CC = moments(reference, x)
    w, scheme = weight(rows=64), WeightScheme(bits=4, is_symmetric=True, group_size=16)

    def miss(cross):
        found = METHODS["gptq"](
            {"w": w},
            {"w": scheme},
            hessian_CC=hessian_CC,
            cross_CC=cross,
            num_tokens=TOKENS,
            scale_dtype=torch.bfloat16,
        )["w"]
        outputs = x @ found.quantized.dequantize().double().numpy().T
        return np.square(outputs - reference @ w.double().numpy().T).sum()

    assert miss(cross_CC) < 0.9 * miss(None)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("damaged", "said"), [(0, "Hessian"), (1, "products with the reference")])
def test_correction_refuses_moments_that_are_not_finite(damaged, said, value):
    both = moments(*inputs())
    both[damaged][3, 4] = value
    with pytest.raises(NumericsError, match=f"the {said} of an input must be finite"):
        target_change(*both)
