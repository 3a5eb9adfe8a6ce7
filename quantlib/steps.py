"""The steps of a block, as functions of tensors: observe a cell, correct a bias, compare and score streams.

B sequences, T positions, D hidden, C columns, V vocabulary. Nothing here knows about workers or storage.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from quantlib.batches import Batch
from quantlib.calibration.capture import InputObserver, InputRecorder, InputStatistics
from quantlib.calibration.moments import Moments
from quantlib.errors import NumericsError
from quantlib.job.memory_needs import LOGITS_BYTES
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.methods.bias_correction import exact_bias
from quantlib.methods.contracts import LinearResult
from quantlib.methods.measures import error_energy, share, weight_energy
from quantlib.model.experts import Experts, extra_rows
from quantlib.model.late_weights import LateWeight
from quantlib.model.skeleton import BlockInputs, OuterModel, run_block
from quantlib.packing.contracts import PackingFormat
from quantlib.packing.outliers import all_packed_names, unpack_linear
from quantlib.readers import Reader
from quantlib.schemes import ActivationScheme, WeightScheme

# Logits are gone over in pieces that stay in a CPU's cache from one pass to the next.
_PIECE_BYTES = 1 << 20
# Elements of two streams compared at a time, in float64, for the same reason.
_COMPARED_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedCell:
    """What one pass of a cell through a block gave.

    Attributes:
        output_BTD: The block's output.
        reference_BTD: That of the reference stream, if there is one.
        statistics: Of input groups.
        num_tokens: Tokens counted.
        left_out: Rows of the cell that are not counted.
    """

    output_BTD: torch.Tensor
    reference_BTD: torch.Tensor | None
    statistics: InputStatistics
    num_tokens: int
    left_out: set[int]


def observe_cell(
    block: nn.Module,
    readers: Mapping[int, Reader],
    hidden_BTD: torch.Tensor,
    batches: Sequence[Batch],
    excluded: Collection[int],
    summed: Collection[int],
    *,
    centered: Collection[int] = (),
    reference_BTD: torch.Tensor | None = None,
    wants_squares: bool = False,
) -> ObservedCell:
    """One forward of a cell, batch by batch, that gathers the statistics of readers.

    When a row turns out to hold a NaN or an infinity the whole cell is run once more without it.

    Args:
        readers: By number; all are looked through for such rows.
        batches: Of the cell.
        excluded: Rows of the cell left out so far.
        summed: Readers whose products are wanted.
        centered: Readers whose sums are wanted beside their products.
        reference_BTD: The reference stream: gives the products of both streams' inputs too, but of experts'.
        wants_squares: Whether sums of squares are wanted of experts' readers.

    Raises:
        NumericsError: Finite inputs whose squares overflow fp32; no row can be blamed.
    """
    left_out = set(excluded)
    while True:
        statistics = InputStatistics()
        output_BTD = torch.empty_like(hidden_BTD)
        followed_BTD = None if reference_BTD is None else torch.empty_like(reference_BTD)
        for rows, inputs in batches:
            references: dict[int, torch.Tensor] = {}
            if reference_BTD is not None and followed_BTD is not None:
                followed_BTD[rows], references = _record_inputs(block, readers, reference_BTD[rows], inputs)
            observer = InputObserver(
                block,
                readers,
                statistics,
                rows=range(rows.start, rows.stop),
                positions=hidden_BTD.shape[1],
                left_out=left_out,
                summed=summed,
                references=references,
                centered=centered,
                wants_squares=wants_squares,
            )
            with observer, _extra_rows(block, readers, hidden_BTD[rows].shape[:2].numel()):
                output_BTD[rows] = run_block(block, hidden_BTD[rows], inputs)
        if not statistics.bad_rows:
            _refuse_overflow(readers, statistics)
            return ObservedCell(
                output_BTD=output_BTD,
                reference_BTD=followed_BTD,
                statistics=statistics,
                num_tokens=(len(hidden_BTD) - len(left_out)) * hidden_BTD.shape[1],
                left_out=left_out,
            )
        left_out |= statistics.bad_rows


@contextmanager
def _extra_rows(block: nn.Module, readers: Mapping[int, Reader], num_tokens: int) -> Iterator[None]:
    """Let experts run the rows of a batch that readers want besides their own."""
    shares: dict[str, float] = {}
    for reader in readers.values():
        if reader.experts is not None:
            shares[reader.experts] = max(reader.extra_share, shares.get(reader.experts, 0.0))
    with ExitStack() as stack:
        for path, share_of_tokens in shares.items():
            experts = cast(Experts, block.get_submodule(path))
            stack.enter_context(extra_rows(experts, math.ceil(share_of_tokens * num_tokens)))
        yield


def _refuse_overflow(readers: Mapping[int, Reader], statistics: InputStatistics) -> None:
    for number, gram in statistics.grams.items():
        if not bool(torch.isfinite(gram.diagonal).all()):
            leader = readers[number].name
            raise NumericsError(
                f"the inputs of {leader} are finite but their squares overflow fp32;"
                " the source model is not usable in this precision",
                linear=leader,
            )


def _record_inputs(
    block: nn.Module, readers: Mapping[int, Reader], hidden_BTD: torch.Tensor, inputs: BlockInputs
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """One forward of a batch: the block's output [B, T, D], and what is read outside experts, [B, T, C]."""
    watched = {number: reader for number, reader in readers.items() if reader.experts is None}
    with InputRecorder(block, watched) as recorder:
        output_BTD = run_block(block, hidden_BTD, inputs)
    return output_BTD, recorder.inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectedResult:
    """A result with the bias that goes with its codes.

    Attributes:
        result: Its report is about the mean.
        rounding_error: What rounding the bias to its dtype leaves, as a share of tr(W H W^T) about the mean.
        error: Of codes and bias together, as a share of the same.
    """

    result: LinearResult
    rounding_error: float
    error: float


def correct_bias(
    result: LinearResult,
    weight_RC: torch.Tensor,
    bias_R: torch.Tensor,
    moments: Moments,
    *,
    num_tokens: int,
) -> CorrectedResult:
    """Find the bias for the codes of a result.

    Shapes:
        weight_RC: floating [R, C], the original weight.
        bias_R: floating [R], the original bias.

    Args:
        moments: Centered ones.
        num_tokens: Tokens behind them.

    Cost: 2 * R * C**2 multiply-adds.
    """
    assert moments.mean_C is not None and moments.reference_mean_C is not None
    weight_RC = weight_RC.float()
    means = {"mean_C": moments.mean_C, "reference_mean_C": moments.reference_mean_C}
    exact_R = exact_bias(bias_R, weight_RC, result.quantized, **means)
    stored_R = exact_R.to(bias_R.dtype)
    energy = weight_energy(weight_RC, moments.hessian_CC)
    change, left = (
        share((stored_R.double() - other_R.double()).square().sum().item() * num_tokens, energy)
        for other_R in (bias_R, exact_R)
    )
    whole = share(error_energy(weight_RC, result.quantized, moments.hessian_CC), energy) + left
    report = dataclasses.replace(
        result.report, bias_change=change, relative_error=result.report.relative_error + left
    )
    return CorrectedResult(
        result=dataclasses.replace(result, report=report, bias_R=stored_R), rounding_error=left, error=whole
    )


def dequantized_weights(
    plan: BlockPlan,
    packed: Mapping[str, torch.Tensor],
    packer: PackingFormat,
    device: torch.device,
    is_late: Container[str] = frozenset(),
) -> dict[str, torch.Tensor]:
    """Stored tensor -> what it is by the packed tensors, fp32: levels in the place of weights.

    Args:
        device: Where they are made, and are then.
        is_late: Names of stored tensors to leave out.
    """
    found: dict[str, torch.Tensor] = {}
    for linear in plan.linears:
        part = linear.weight
        if linear.scheme is None or part.tensor in is_late:
            continue
        there = _packed_on(device, packer, linear.name, packed)
        levels_RC = unpack_linear(packer, linear.name, there, linear.scheme).dequantize()
        if part.view is None:
            found[part.tensor] = levels_RC
        else:
            if part.tensor not in found:
                found[part.tensor] = levels_RC.new_empty(part.view.whole)
            part.of(found).copy_(levels_RC)
    return found


def late_levels(
    plan: BlockPlan, packed: Mapping[str, torch.Tensor], packer: PackingFormat, device: torch.device
) -> dict[str, LateWeight]:
    """Of weights that are tensors of their own: unpacked only while a linear runs."""

    def late(linear: LinearPlan, scheme: WeightScheme) -> LateWeight:
        def begin() -> Callable[[slice], torch.Tensor]:
            there = _packed_on(device, packer, linear.name, packed)
            quantized = unpack_linear(packer, linear.name, there, scheme)
            return lambda rows: quantized.rows(rows).dequantize()

        return LateWeight(shape=(linear.rows, linear.columns), begin=begin)

    return {
        linear.weight.tensor: late(linear, linear.scheme)
        for linear in plan.linears
        if linear.scheme is not None and linear.weight.view is None
    }


def _packed_on(
    device: torch.device, packer: PackingFormat, name: str, packed: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear."""
    return {part: packed[part].to(device) for part in all_packed_names(packer, name) if part in packed}


def input_schemes(plan: BlockPlan) -> dict[str, ActivationScheme]:
    """Linear -> what its inputs are rounded to, of those whose scheme says so."""
    return {
        linear.name: linear.scheme.inputs
        for linear in plan.linears
        if linear.scheme is not None and linear.scheme.inputs is not None
    }


def split_biases(plan: BlockPlan | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Biases that are written by themselves, read from the stored tensors that they are parts of."""
    return {
        f"{linear.name}.bias": linear.split_bias.of(tensors).contiguous()
        for linear in (plan.linears if plan else ())
        if linear.split_bias is not None and linear.split_bias.tensor in tensors
    }


def corrected_biases(plan: BlockPlan, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that go with the codes, by name."""
    return {f"{x.name}.bias": packed[f"{x.name}.bias"] for x in plan.linears if x.corrects_bias}


def stream_error(original_BTD: torch.Tensor, quantized_BTD: torch.Tensor) -> dict[str, float]:
    """Sums from which relative error and cosine of two streams follow, in float64.

    Rows with non-finite values in the original stream are left out.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=original_BTD.device)
    for original_TD, quantized_TD in zip(original_BTD, quantized_BTD, strict=True):
        row_sums = _row_sums(original_TD.flatten(), quantized_TD.flatten())
        # float64 holds the square of every finite value: the sum is finite when the whole row is.
        sums = torch.where(row_sums[1].isfinite(), sums + row_sums, sums)
    return dict(zip(("error", "original", "quantized", "product"), sums.tolist(), strict=True))


def _row_sums(original_N: torch.Tensor, quantized_N: torch.Tensor) -> torch.Tensor:
    """float64 [4]: squares of the difference, of either row, and the product of both."""
    sums = torch.zeros(4, dtype=torch.float64, device=original_N.device)
    pieces = zip(original_N.split(_COMPARED_ELEMENTS), quantized_N.split(_COMPARED_ELEMENTS), strict=True)
    for original_piece, quantized_piece in pieces:
        original, quantized = original_piece.double(), quantized_piece.double()
        gap = quantized - original
        pairs = ((gap, gap), (original, original), (quantized, quantized), (original, quantized))
        sums += torch.stack([torch.dot(left, right) for left, right in pairs])
    return sums


def score_streams(
    outer: OuterModel,
    ids_BT: torch.Tensor,
    original_BTD: torch.Tensor,
    quantized_BTD: torch.Tensor | None,
    quantized_outer: OuterModel | None = None,
) -> dict[str, float]:
    """Next-token loss of one or two streams inside each row, and their divergence.

    Rows whose original stream holds a NaN or an infinity are left out and counted.

    Args:
        outer: The model around its blocks.
        ids_BT: Token ids of the rows.
        original_BTD: After the last block.
        quantized_BTD: The second stream.
        quantized_outer: What stands around its blocks, where that is not the original model.

    Returns:
        ``tokens``, ``sequences``, ``excluded_sequences``, ``nll_original`` and, with a second stream,
        ``nll_quantized`` and ``kl_divergence``: sums over predicted tokens, in nats.

    Numerics: logits and softmax in fp32, sums in float64.
    """
    positions = ids_BT.shape[1] - 1
    finite_B = torch.isfinite(original_BTD).flatten(1).all(dim=1).tolist()
    kept = [row for row, is_finite in enumerate(finite_B) if is_finite]
    streams = [original_BTD] if quantized_BTD is None else [original_BTD, quantized_BTD]
    parts: list[torch.Tensor] = []
    # The first product is of one position: it tells how large the vocabulary is.
    width = 1
    for row in kept:
        start = 0
        while start < positions:
            # What is left in equal parts: a small rest would be a slow product.
            stop = start + math.ceil((positions - start) / math.ceil((positions - start) / width))
            hidden_STD = torch.stack([stream[row, start:stop] for stream in streams])
            logits_STV = _logits(outer, quantized_outer, hidden_STD)
            width = max(1, LOGITS_BYTES // (4 * len(streams) * logits_STV.shape[-1]))
            target_T = ids_BT[row, start + 1 : stop + 1].long().to(logits_STV.device)
            parts.append(_score_(logits_STV, target_T))
            del logits_STV  # else it stays while the next ones are made
            start = stop
    counts = {
        "tokens": float(positions * len(kept)),
        "sequences": float(len(kept)),
        "excluded_sequences": float(len(finite_B) - len(kept)),
    }
    sums = torch.stack(parts).sum(dim=0).tolist() if parts else [0.0, 0.0, 0.0]
    return counts | dict(zip(("nll_original", "nll_quantized", "kl_divergence"), sums, strict=True))


def _logits(outer: OuterModel, quantized_outer: OuterModel | None, hidden_STD: torch.Tensor) -> torch.Tensor:
    if quantized_outer is None:
        return outer.logits(hidden_STD)
    return torch.cat([outer.logits(hidden_STD[:1]), quantized_outer.logits(hidden_STD[1:])])


def _score_(logits_STV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """float64 [3]: loss of the first stream; of the second and KL(first || second), 0 without a second.

    Shapes:
        logits_STV: fp32 [1 or 2, T, V]. Overwritten.
    """
    num_rows = max(1, _PIECE_BYTES // (4 * logits_STV.shape[-1]))
    sums = torch.zeros(3, dtype=torch.float64, device=logits_STV.device)
    for piece_SPV, target_P in zip(logits_STV.split(num_rows, dim=1), target_T.split(num_rows), strict=True):
        original_PV = piece_SPV[0]
        gap_PV = original_PV - piece_SPV[1] if len(piece_SPV) == 2 else None
        picked_SP = piece_SPV.gather(2, target_P.expand(len(piece_SPV), -1)[..., None])[..., 0].double()
        # Not cross_entropy: over a large vocabulary its fp32 sum is off by 1e-5 nats, all in one direction.
        peak_SP1 = piece_SPV.amax(dim=2, keepdim=True)
        total_SP = piece_SPV.sub_(peak_SP1).exp_().sum(dim=2).double()
        lse_SP = peak_SP1[..., 0].double() + total_SP.log()
        sums[: len(piece_SPV)] += (lse_SP - picked_SP).sum(dim=1)
        if gap_PV is not None:
            # KL is the mean of log p - log q over p; p is what `original_PV` holds now, over its total.
            mean_gap_P = gap_PV.mul_(original_PV).sum(dim=1).double() / total_SP[0]
            sums[2] += (mean_gap_P - lse_SP[0] + lse_SP[1]).sum()
    return sums


def perplexity(nll: float, tokens: float) -> float:
    """exp of the mean loss a token; infinity where fp64 cannot hold it, NaN without tokens.

    >>> round(perplexity(10 * 2.0, 10), 6)
    7.389056
    """
    if not tokens:
        return math.nan
    return math.exp(nll / tokens) if nll / tokens < 700 else math.inf
