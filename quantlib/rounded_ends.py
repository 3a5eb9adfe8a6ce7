"""Embedding and head that are rounded to nearest: the tensors that are written, and the levels that run."""

from collections.abc import Collection, Mapping
from functools import partial

import torch

from quantlib.job.plan import RoundedMatrix
from quantlib.model.skeleton import OuterModel, Skeleton
from quantlib.packing import gguf_format
from quantlib.packing.gguf_rounding import levels_of_q8_0, round_to_q8_0


def rounded_blocks(
    matrices: Collection[RoundedMatrix], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Packed tensors of those matrices whose source is given, by name.

    Raises:
        PackingError: See `quantlib.packing.gguf_rounding.round_to_q8_0`.
    """
    return {
        f"{matrix.name}{gguf_format.SUFFIX}": round_to_q8_0(matrix.name, tensors[matrix.weight.name])
        for matrix in matrices
        if matrix.weight.name in tensors
    }


# The original model around its blocks, and the same with the levels of what is rounded; None if nothing is.
Ends = tuple[OuterModel, OuterModel | None]


def live_ends(
    skeleton: Skeleton,
    matrices: Collection[RoundedMatrix],
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Ends:
    """What stands around the blocks, original and rounded.

    Args:
        skeleton: Of the model.
        matrices: What is rounded; those whose source is not given are passed over.
        tensors: Source tensors of one end of the model, or of both.
        dtype: Of the parameters; levels are worked out in fp32 and rounded to it.
        device: Where they go.

    Raises:
        PackingError: See `quantlib.packing.gguf_rounding.round_to_q8_0`.
    """
    build = partial(skeleton.build_outer, dtype=dtype, device=device)
    if not matrices:
        return build(tensors), None
    levels = {}
    for matrix in matrices:
        if matrix.weight.name in tensors:
            blocks = round_to_q8_0(matrix.name, tensors[matrix.weight.name])
            levels[matrix.weight.name] = levels_of_q8_0(matrix.name, blocks, dtype=dtype, device=device)
    return build(tensors), build({**tensors, **levels})
