"""Memory for what is as large as a matrix and is written once: codes, and words of packed codes.

Fetching memory page by page may cost more than what is written to it. numpy asks Linux for large pages where
an array has 4 MiB or more, PyTorch does not.
"""

from collections.abc import Sequence

import numpy as np
import torch


def fresh_bytes(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """A tensor that is not filled: uint8 of this shape, contiguous.

    >>> fresh_bytes((2, 3), torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    if device.type == "cpu":
        return torch.from_numpy(np.empty(tuple(shape), dtype=np.uint8))
    return torch.empty(tuple(shape), dtype=torch.uint8, device=device)
