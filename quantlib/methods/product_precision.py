"""How exactly a GPU takes the products that carry errors to columns solved later."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def carrying_products(device: torch.device, *, in_tf32: bool) -> Iterator[None]:
    """Have products of fp32 round their inputs to TF32 while this lasts, on a GPU and where that is wanted.

    What is carried is a small part of a target, so that few codes are others. A CPU has no TF32, and nothing
    changes.
    """
    if not in_tf32 or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
