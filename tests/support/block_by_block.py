"""Runs a skeleton over its blocks one at a time, as the conversion does, without storage around it."""

from collections.abc import Mapping

import torch

from quantlib.model.skeleton import Skeleton, run_block


def logits_block_by_block(
    skeleton: Skeleton,
    tensors: Mapping[str, torch.Tensor],
    ids_BT: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """fp32 logits; embedding, blocks and head are never in memory together."""
    prelude = {name: tensors[name] for name in skeleton.prelude_tensors}
    hidden_BTD, inputs = skeleton.build_outer(prelude, dtype=dtype, device="cpu").embed(ids_BT)
    for index in range(skeleton.num_blocks):
        needed = {name: tensors[name] for name in skeleton.block_spec(index).tensors}
        block = skeleton.build_block(index, needed, dtype=dtype, device="cpu")
        hidden_BTD = run_block(block, hidden_BTD, inputs[index])
    tail = {name: tensors[name] for name in skeleton.tail_tensors}
    return skeleton.build_outer(tail, dtype=dtype, device="cpu").logits(hidden_BTD)
