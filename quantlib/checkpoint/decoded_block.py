"""The tensors of a block as its model wants them, from a checkpoint that may hold its linears by themselves.

What was a part of a fused tensor, or was stored transposed, goes to its place in a tensor of that layout.
"""

from collections.abc import Iterator

import torch

from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.model.block_spec import BlockSpec
from quantlib.storage import Store
from quantlib.strided_view import StoredPart


def read_block(store: Store, checkpoint: Checkpoint, spec: BlockSpec) -> dict[str, torch.Tensor]:
    """All tensors of a block in the layout that its model loads, in the dtypes of the checkpoint.

    Raises:
        CheckpointError: A tensor, or a linear that is a part of one, is not stored.

    Cost: memory of the tensors, and once more of the levels of linears that are put into others.
    """
    parts: dict[str, list[tuple[str, StoredPart]]] = {}
    for name, part in _parts(spec):
        # Of a linear that is decoded under its own name the rows are its outputs, as those of any other.
        is_turned = part.tensor == name and name in checkpoint.decoded
        if is_turned or part.tensor not in checkpoint.tensors:
            parts.setdefault(part.tensor, []).append((name, part))
    tensors = read_tensors(store, checkpoint, [name for name in spec.tensors if name not in parts])
    for members in parts.values():
        _join(members, read_tensors(store, checkpoint, [name for name, _ in members]), tensors)
    return tensors


def _parts(spec: BlockSpec) -> Iterator[tuple[str, StoredPart]]:
    """Names that linears have by themselves, and where the model wants what is stored under them."""
    for linear in spec.linears:
        if linear.weight_view is not None:
            yield (
                f"{linear.name}.weight",
                StoredPart(tensor=linear.weight_tensors[0], view=linear.weight_view),
            )
        if linear.bias is not None and linear.bias.view is not None:
            yield f"{linear.name}.bias", linear.bias


def _join(
    members: list[tuple[str, StoredPart]], found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    for name, part in members:
        assert part.view is not None, "only parts are joined"
        if part.tensor not in tensors:
            tensors[part.tensor] = torch.empty(part.view.whole, dtype=found[name].dtype)
        part.of(tensors).copy_(found.pop(name))
