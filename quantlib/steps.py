"""The steps of a block, as functions of tensors: observe a cell, solve a group, compare and score streams.

B sequences, T positions, D hidden, C columns, V vocabulary. Nothing here knows about workers or storage.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantlib.calibration.capture import InputObserver, InputStatistics
from quantlib.errors import NumericsError
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.methods import METHODS
from quantlib.methods.contracts import LinearResult
from quantlib.model.skeleton import BlockInputs, OuterModel, run_block
from quantlib.packing.contracts import PackingFormat
from quantlib.schemes import WeightScheme

# fp32 logits held at a time while scoring.
_LOGITS_BYTES = 64 << 20


def observe_cell(
    block: nn.Module,
    plan: BlockPlan,
    hidden_BTD: torch.Tensor,
    inputs: BlockInputs,
    excluded: Collection[int],
) -> tuple[torch.Tensor, InputStatistics, set[int]]:
    """One forward of a cell that gathers the statistics of every input group.

    Args:
        excluded: Rows of the cell left out so far.

    Returns:
        The block's output [B, T, D], the statistics, and the rows left out now. When a row turns out to
        hold a NaN or an infinity the cell is run once more without it.

    Raises:
        NumericsError: Finite inputs whose squares overflow fp32; no row can be blamed.
    """
    leaders = [group[0].removeprefix(plan.prefix + ".") for group in plan.input_groups]
    excluded = set(excluded)
    while True:
        with InputObserver(block, leaders, num_rows=hidden_BTD.shape[0], left_out=excluded) as observer:
            output_BTD = run_block(block, hidden_BTD, inputs)
        statistics = observer.statistics
        if statistics.bad_rows:
            excluded |= statistics.bad_rows
            continue
        for group, gram in zip(plan.input_groups, statistics.grams, strict=True):
            if gram is None or not bool(torch.isfinite(gram.diagonal()).all()):
                raise NumericsError(
                    f"the inputs of {group[0]} are finite but their squares overflow fp32;"
                    " the source model is not usable in this precision",
                    linear=group[0],
                )
        return output_BTD, statistics, excluded


def solve_group(
    weights: Mapping[str, torch.Tensor],
    linears: Sequence[LinearPlan],
    *,
    hessian_CC: torch.Tensor | None,
    num_tokens: int,
    scale_dtype: torch.dtype,
) -> dict[str, LinearResult]:
    """Quantize the linears of one input group; those of one method share its factorization.

    Args:
        weights: Linear name -> [R, C], any floating dtype.
        hessian_CC: fp32 [C, C] sum of x x^T; None for methods without data.
    """
    results: dict[str, LinearResult] = {}
    for method in sorted({linear.method for linear in linears if linear.method}):
        chosen = [linear for linear in linears if linear.method == method]
        schemes: dict[str, WeightScheme] = {
            linear.name: linear.scheme for linear in chosen if linear.scheme is not None
        }
        results |= METHODS[method](
            {name: weights[name].float() for name in schemes},
            schemes,
            hessian_CC=hessian_CC,
            num_tokens=num_tokens,
            scale_dtype=scale_dtype,
        )
    return results


def dequantized_weights(
    plan: BlockPlan, packed: Mapping[str, torch.Tensor], packer: PackingFormat
) -> dict[str, torch.Tensor]:
    """Weight name -> fp32 levels [R, C] of a block's quantized linears, read from the packed tensors."""
    return {
        f"{linear.name}.weight": packer.unpack(linear.name, packed, linear.scheme).dequantize()
        for linear in plan.linears
        if linear.scheme is not None
    }


def stream_error(original_BTD: torch.Tensor, quantized_BTD: torch.Tensor) -> dict[str, float]:
    """Sums from which relative error and cosine of two streams follow, in float64.

    Rows with non-finite values in the original stream are left out.
    """
    finite_B = torch.isfinite(original_BTD).flatten(1).all(dim=1)
    original = original_BTD[finite_B].double().flatten()
    quantized = quantized_BTD[finite_B].double().flatten()
    return {
        "error": float((quantized - original).square_().sum()),
        "original": float(original.square().sum()),
        "quantized": float(quantized.square().sum()),
        "product": float(torch.dot(original, quantized)),
    }


def score_streams(
    outer: OuterModel, ids_BT: torch.Tensor, original_BTD: torch.Tensor, quantized_BTD: torch.Tensor | None
) -> dict[str, float]:
    """Next-token loss of one or two streams inside each row, and their divergence.

    Rows whose original stream holds a NaN or an infinity are left out and counted.

    Returns:
        ``tokens``, ``sequences``, ``excluded_sequences``, ``nll_original`` and, with a second stream,
        ``nll_quantized`` and ``kl_divergence``: sums over predicted tokens, in nats.

    Numerics: logits and softmax in fp32, sums in float64.
    """
    sums = {"nll_original": 0.0, "nll_quantized": 0.0, "kl_divergence": 0.0}
    positions = ids_BT.shape[1] - 1
    finite_B = torch.isfinite(original_BTD).flatten(1).all(dim=1).tolist()
    kept = [row for row, is_finite in enumerate(finite_B) if is_finite]
    for row in kept:
        start, width = 0, 1
        while start < positions:
            stop = min(start + width, positions)
            logits_TV = outer.logits(original_BTD[row : row + 1, start:stop])[0]
            width = max(1, _LOGITS_BYTES // (4 * logits_TV.shape[-1]))
            target_T = ids_BT[row, start + 1 : stop + 1].long().to(logits_TV.device)
            if quantized_BTD is None:
                sums["nll_original"] += _nll(logits_TV, target_T)
            else:
                other_TV = outer.logits(quantized_BTD[row : row + 1, start:stop])[0]
                for name, value in _compare(logits_TV, other_TV, target_T).items():
                    sums[name] += value
            start = stop
    counts = {
        "tokens": float(positions * len(kept)),
        "sequences": float(len(kept)),
        "excluded_sequences": float(len(finite_B) - len(kept)),
    }
    return counts | sums


def _nll(logits_TV: torch.Tensor, target_T: torch.Tensor) -> float:
    # Not cross_entropy: over a large vocabulary its fp32 sum is off by 1e-5 nats, all in one direction.
    picked_T = logits_TV.gather(1, target_T[:, None])[:, 0].double()
    return float((torch.logsumexp(logits_TV, dim=1).double() - picked_T).sum())


def _compare(
    original_TV: torch.Tensor, quantized_TV: torch.Tensor, target_T: torch.Tensor
) -> dict[str, float]:
    """Losses of both and KL(original || quantized) = E_original[log p - log q], one exponential each."""
    picked = target_T[:, None]
    original_T = original_TV.gather(1, picked)[:, 0].double()
    quantized_T = quantized_TV.gather(1, picked)[:, 0].double()
    lse_quantized_T = torch.logsumexp(quantized_TV, dim=1).double()
    peak_T = original_TV.amax(dim=1, keepdim=True)
    p_TV = (original_TV - peak_T).exp_()
    total_T = p_TV.sum(dim=1)
    lse_original_T = peak_T[:, 0].double() + total_T.double().log()
    mean_gap_T = (original_TV - quantized_TV).mul_(p_TV).sum(dim=1).double() / total_T.double()
    return {
        "nll_original": float((lse_original_T - original_T).sum()),
        "nll_quantized": float((lse_quantized_T - quantized_T).sum()),
        "kl_divergence": float((mean_gap_T - lse_original_T + lse_quantized_T).sum()),
    }


def perplexity(nll: float, tokens: float) -> float:
    """exp of the mean loss a token; infinity where fp64 cannot hold it, NaN without tokens.

    >>> round(perplexity(10 * 2.0, 10), 6)
    7.389056
    """
    if not tokens:
        return math.nan
    return math.exp(nll / tokens) if nll / tokens < 700 else math.inf


def report_rows(results: Mapping[str, LinearResult]) -> list[dict[str, Any]]:
    """The reports of quantized linears as JSON values."""
    return [result.report.to_dict() for result in results.values()]
