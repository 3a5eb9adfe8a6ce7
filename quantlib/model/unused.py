"""Why stored tensors are of no use to the model that runs: each has a reason, found in the structure.

transformers does not load next-token prediction layers, old checkpoints store buffers that are computed
today, and a forward of text runs no other tower. All of them are kept in the output as they are.
"""

import re
from collections.abc import Collection

from transformers import PreTrainedModel

RECOMPUTED = "buffer that the model computes by itself"
LATER_LAYER = "layer after the last block, such as next-token prediction, which transformers does not run"
IGNORED = "ignored by transformers, such as next-token prediction"
OTHER_TOWER = "part of the model that text does not run through, such as a vision tower"
UNKNOWN = "used by no part of the model"


def why_unused(
    model: PreTrainedModel,
    names: Collection[str],
    *,
    blocks: str | None,
    num_blocks: int,
    other_towers: Collection[str],
) -> dict[str, str]:
    """Stored name -> why the model has no use for it, sorted by name.

    Args:
        model: On the meta device.
        names: Stored tensors that no part of the model uses.
        blocks: What stored names of the blocks begin with before the number; None where that is unknown.
        num_blocks: How many blocks the model has.
        other_towers: Stored names of what a forward of text does not run.
    """
    buffers = {
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    later = None if blocks is None else re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def reason(name: str) -> str:
        if name in other_towers:
            return OTHER_TOWER
        if ".".join(name.split(".")[-2:]) in buffers:
            return RECOMPUTED
        number = later.match(name) if later else None
        if number is not None and int(number[1]) >= num_blocks:
            return LATER_LAYER
        return IGNORED if any(pattern.search(name) for pattern in ignored) else UNKNOWN

    return {name: reason(name) for name in sorted(names)}
