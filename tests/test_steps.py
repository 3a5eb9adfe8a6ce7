"""Comparing and scoring streams, against plain definitions in float64."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.steps import score_streams, stream_error


class _Head:
    """Stands where an outer model would: a linear head, position by position."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        self._weight = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(3))

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD @ self._weight.T

    def log_probabilities(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(hidden_BTD.double() @ self._weight.double().T, dim=-1)


def _definitions(p_BTV: torch.Tensor, q_BTV: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Losses and divergence by their formulae, from the log probabilities of all positions but the last."""
    targets = ids[:, 1:, None].long()
    return {
        "nll_original": -float(p_BTV.gather(2, targets).sum()),
        "nll_quantized": -float(q_BTV.gather(2, targets).sum()),
        "kl_divergence": float((p_BTV.exp() * (p_BTV - q_BTV)).sum()),
    }


def test_score_streams_equals_the_definitions_of_loss_and_divergence():
    generator = torch.Generator().manual_seed(0)
    head = _Head(50, 8)
    original = torch.randn(3, 7, 8, generator=generator)
    quantized = original + 0.1 * torch.randn(3, 7, 8, generator=generator)
    ids = torch.randint(50, (3, 7), generator=generator, dtype=torch.int32)
    sums = score_streams(head, ids, original, quantized)  # pyright: ignore[reportArgumentType]
    p = head.log_probabilities(original[:, :-1])
    q = head.log_probabilities(quantized[:, :-1])
    exact = _definitions(p, q, ids)
    assert sums["tokens"] == 18
    assert sums["sequences"] == 3
    assert math.isclose(sums["nll_original"], exact["nll_original"], rel_tol=1e-6)
    assert math.isclose(sums["nll_quantized"], exact["nll_quantized"], rel_tol=1e-6)
    assert math.isclose(sums["kl_divergence"], exact["kl_divergence"], rel_tol=1e-4)


def test_score_streams_over_a_large_vocabulary_is_off_by_less_than_1e_6_nats_a_token():
    # So many words that the logits of a row are gone over in several pieces.
    generator = torch.Generator().manual_seed(1)
    head = _Head(50_000, 16)
    original = torch.randn(2, 14, 16, generator=generator)
    quantized = original + 0.1 * torch.randn(2, 14, 16, generator=generator)
    ids = torch.randint(50_000, (2, 14), generator=generator, dtype=torch.int32)
    p = torch.log_softmax(head.logits(original[:, :-1]).double(), dim=-1)
    q = torch.log_softmax(head.logits(quantized[:, :-1]).double(), dim=-1)
    exact = _definitions(p, q, ids)
    sums = score_streams(head, ids, original, quantized)  # pyright: ignore[reportArgumentType]
    assert sums["tokens"] == 26
    for name, value in exact.items():
        assert abs(sums[name] - value) / sums["tokens"] < 1e-6, name


def test_score_streams_of_one_stream_is_the_loss_of_that_stream():
    generator = torch.Generator().manual_seed(0)
    head = _Head(50, 8)
    hidden = torch.randn(2, 5, 8, generator=generator)
    ids = torch.randint(50, (2, 5), generator=generator, dtype=torch.int32)
    alone = score_streams(head, ids, hidden, None)  # pyright: ignore[reportArgumentType]
    both = score_streams(head, ids, hidden, hidden)  # pyright: ignore[reportArgumentType]
    assert math.isclose(alone["nll_original"], both["nll_original"], rel_tol=1e-6)
    assert math.isclose(both["nll_quantized"], both["nll_original"], rel_tol=1e-6)
    assert abs(both["kl_divergence"]) < 1e-4


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 2.0))
def test_stream_error_sums_give_relative_error_and_cosine(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(2, 3, 4, generator=generator)
    quantized = original + noise * torch.randn(2, 3, 4, generator=generator)
    sums = stream_error(original, quantized)
    a, b = original.double().flatten(), quantized.double().flatten()
    assert math.isclose(sums["error"], float(((a - b) ** 2).sum()), rel_tol=1e-9, abs_tol=1e-12)
    cosine = sums["product"] / math.sqrt(sums["original"] * sums["quantized"])
    assert math.isclose(cosine, float(torch.nn.functional.cosine_similarity(a, b, dim=0)), rel_tol=1e-9)


def test_score_streams_leaves_out_rows_that_are_not_finite_in_the_original():
    generator = torch.Generator().manual_seed(0)
    head = _Head(50, 8)
    hidden = torch.randn(3, 5, 8, generator=generator)
    ids = torch.randint(50, (3, 5), generator=generator, dtype=torch.int32)
    whole = score_streams(head, ids[[0, 2]], hidden[[0, 2]], None)  # pyright: ignore[reportArgumentType]
    hidden[1, 3, 2] = float("inf")
    sums = score_streams(head, ids, hidden, None)  # pyright: ignore[reportArgumentType]
    assert sums == {**whole, "excluded_sequences": 1.0}


def test_stream_error_of_long_rows_equals_the_float64_sums_over_the_finite_ones():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(3, 300, 1000, generator=generator)
    quantized = original + 0.1 * torch.randn(3, 300, 1000, generator=generator)
    a, b = original[[0, 2]].double(), quantized[[0, 2]].double()
    original[1, 299, 999] = float("inf")
    sums = stream_error(original, quantized)
    exact = {"error": (b - a).square(), "original": a.square(), "quantized": b.square(), "product": a * b}
    for name, values in exact.items():
        assert math.isclose(sums[name], float(values.sum()), rel_tol=1e-12), name


def test_stream_error_leaves_out_rows_without_finite_values():
    original = torch.ones(2, 1, 2)
    original[1, 0, 0] = float("nan")
    sums = stream_error(original, torch.full((2, 1, 2), 3.0))
    assert sums == {"error": 8.0, "original": 2.0, "quantized": 18.0, "product": 6.0}
