"""Gives every tensor of a source its state and reason before anything is written.

Taken from the units, which say what will be written, and not from the rules: what no unit has, or two have,
is found here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from quantlib.checkpoint.index import Checkpoint
from quantlib.errors import UnsupportedModelError
from quantlib.job.accounts import COPIED, CORRECTED, DROPPED, QUANTIZED, Account, summed_up
from quantlib.job.plan import BlockPlan, RoundedMatrix, UnitPlan
from quantlib.model.skeleton import Skeleton

_OF_BLOCK = "norm, router or other small part of a block"
_BIAS = "bias of a linear"
_SPLIT_BIAS = "biases of linears that were stored as one tensor and are written one a linear"
_CORRECTED = "bias that makes up for what its linear lost"
_BY_RULE = "weight of a linear that a rule keeps"
_BEFORE = "embedding, or another part before the blocks"
_AFTER = "norm, or another part after the blocks"
_HEAD = "linear outside the blocks, such as the head"
_TIED = "embedding, tied to the head by config.json"
_UNTIED = "head that config.json ties to the embedding but that is stored, and used"


def account(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    blocks: Sequence[BlockPlan],
    units: Sequence[UnitPlan],
    dropped: Mapping[str, str],
) -> tuple[Account, ...]:
    """What becomes of every source tensor.

    Raises:
        UnsupportedModelError: A tensor would be lost, or written twice.
    """
    rounded = [matrix for unit in units for matrix in unit.rounded]
    states = [
        *_changed(skeleton, blocks),
        *((matrix.weight.name, QUANTIZED) for matrix in rounded),
        *((name, COPIED) for unit in units for name in unit.copied),
        *((name, DROPPED) for name in dropped),
    ]
    _refuse_lost(checkpoint.tensors, [name for name, _ in states])
    reasons = {**_reasons_of_copies(skeleton, blocks), **_reasons_of_changes(skeleton, blocks), **dropped}
    reasons |= _reasons_of_rounding(rounded)
    # What is dropped may be stored beside the tensors that are meant.
    entries = {**checkpoint.stored, **checkpoint.tensors}
    return summed_up((name, state, reasons[name], entries[name].size_bytes) for name, state in states)


def _changed(skeleton: Skeleton, blocks: Sequence[BlockPlan]) -> Iterator[tuple[str, str]]:
    for block in blocks:
        weights = _weights(skeleton, block.index)
        of_block = {
            name: QUANTIZED for linear in block.linears if linear.scheme for name in weights[linear.name]
        }
        of_block |= {f"{linear.name}.bias": CORRECTED for linear in block.linears if linear.corrects_bias}
        of_block |= {linear.split_bias.tensor: COPIED for linear in block.linears if linear.split_bias}
        yield from of_block.items()


def _reasons_of_changes(skeleton: Skeleton, blocks: Sequence[BlockPlan]) -> dict[str, str]:
    reasons = {}
    for block in blocks:
        weights = _weights(skeleton, block.index)
        for linear in block.linears:
            if linear.scheme is not None:
                reasons |= dict.fromkeys(weights[linear.name], f"to {linear.scheme}")
            if linear.corrects_bias:
                reasons[f"{linear.name}.bias"] = _CORRECTED
            if linear.split_bias is not None:
                reasons[linear.split_bias.tensor] = _SPLIT_BIAS
    return reasons


def _reasons_of_rounding(rounded: Sequence[RoundedMatrix]) -> dict[str, str]:
    return {matrix.weight.name: f"embedding or head, to {matrix.scheme}" for matrix in rounded}


def _reasons_of_copies(skeleton: Skeleton, blocks: Sequence[BlockPlan]) -> dict[str, str]:
    """Why a tensor that is copied is; the reason that says most comes last."""
    outside = {f"{name}.weight" for name in skeleton.outside_linears}
    reasons = dict.fromkeys(skeleton.prelude_tensors, _BEFORE)
    for name in skeleton.tail_tensors:
        is_tied = name in reasons
        reasons[name] = _TIED if is_tied else _HEAD if name in outside else _AFTER
    reasons |= dict.fromkeys(skeleton.untied_tensors, _UNTIED)
    reasons |= skeleton.unused_reasons
    for block in blocks:
        weights = _weights(skeleton, block.index)
        reasons |= dict.fromkeys(block.tensors, _OF_BLOCK)
        for linear in block.linears:
            reasons |= dict.fromkeys(weights[linear.name], _BY_RULE)
            reasons[f"{linear.name}.bias"] = _BIAS
    return reasons


def _weights(skeleton: Skeleton, index: int) -> dict[str, tuple[str, ...]]:
    return {linear.name: linear.weight_tensors for linear in skeleton.block_spec(index).linears}


def _refuse_lost(tensors: Iterable[str], accounted: Sequence[str]) -> None:
    times = Counter(accounted)
    for name in tensors:
        if times[name] != 1:
            found = "neither quantized, copied nor dropped" if not times[name] else "written twice"
            raise UnsupportedModelError(
                f"tensor {name} of the source would be {found}; models stored like this cannot be converted",
                tensor=name,
            )
