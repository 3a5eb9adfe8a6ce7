"""What a block cannot cost less than: operations and bytes counted from its shape, at rates measured here.

T tokens, n columns of an input group, m rows of its linears. A forward is 2 flops a weight and token, and
2 * length * width a token for causal attention; the lower half of X^T X is n**2 a token; a factor n**3 / 3; a
solve m * n**2. Weights come from the host once, and packed tensors go there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantlib.simulation.shapes import BlockShape

_PROBES = 5
# Sides of a product and elements of a copy, enough to fill the device.
_GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations and bytes of a block.

    Attributes:
        forward: Flops of one pass of all tokens.
        statistics: Flops of the lower halves of X^T X.
        factor: Flops of the factors.
        columns: Flops of the solves.
        source_bytes: Of the stored weights.
        packed_bytes: Of the shard.
    """

    forward: float
    statistics: float
    factor: float
    columns: float
    source_bytes: int
    packed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What this device does, a second.

    Attributes:
        bf16: Flops of a product of bf16 matrices.
        fp32: Flops of one of fp32 matrices, without TF32.
        copied: Bytes that a copy on the device reads and writes.
        from_host: Bytes from pinned memory of the host; as ``copied`` where that is the device.
        to_host: Bytes there; likewise.
    """

    bf16: float
    fp32: float
    copied: float
    from_host: float
    to_host: float


def work_of(block: BlockShape, tokens: int, sequence_length: int) -> Work:
    """What one block takes at the least; each expert sees an equal part of the tokens."""
    attention = sequence_length * block.attention_width
    return Work(
        forward=2 * tokens * (block.passed_weights + attention),
        statistics=sum(tokens * group.token_share * group.columns**2 for group in block.groups),
        factor=sum(group.columns**3 / 3 for group in block.groups),
        columns=sum(group.rows * group.columns**2 for group in block.groups),
        source_bytes=block.source_bytes,
        packed_bytes=block.output_bytes,
    )


def floors(work: Work, rates: Rates, compute_dtype: torch.dtype) -> dict[str, float]:
    """Part -> seconds; one part after the other they are the floor of a block.

    Args:
        compute_dtype: Of the forward, and of the inputs whose products are summed.
    """
    products = rates.bf16 if compute_dtype == torch.bfloat16 else rates.fp32
    return {
        "load": work.source_bytes / rates.from_host,
        "forward": work.forward / products,
        "statistics": work.statistics / products,
        "factor": work.factor / rates.fp32,
        "columns": work.columns / rates.fp32,
        "pack": work.packed_bytes / rates.to_host,
    }


def traffic(block: BlockShape, num_cells: int, rates: Rates) -> dict[str, float]:
    """Part -> seconds that its bytes take: no floor of the problem, but of the way in which it is solved.

    Entries below the diagonal: a cell's in fp32 join an exact sum in int64, which goes to the host and back;
    a Hessian is whole, in fp32.
    """
    entries = sum(group.columns**2 for group in block.groups)
    return {
        "exact sums": num_cells * (4 + 8 + 8) * entries / 2 / rates.copied,
        "sums to host": 8 * entries / 2 / rates.to_host,
        "Hessian": 8 * entries / 2 / rates.from_host + 4 * entries / rates.copied,
    }


def measured_rates(device: torch.device) -> Rates:
    """The best of a few products and copies of random data, beside which others may have been at work."""
    side, size = _GEMM_SIDE[device.type], _COPIED_BYTES[device.type]
    bf16, fp32 = (_product_rate(device, dtype, side) for dtype in (torch.bfloat16, torch.float32))
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _seconds(device, lambda: target.copy_(source))
    from_host = to_host = copied
    if device.type == "cuda":
        pinned = torch.empty(size // 4, pin_memory=True)
        from_host = size / _seconds(device, lambda: target.copy_(pinned, non_blocking=True))
        to_host = size / _seconds(device, lambda: pinned.copy_(source, non_blocking=True))
    return Rates(
        bf16=bf16,
        fp32=fp32,
        copied=copied,
        from_host=from_host,
        to_host=to_host,
    )


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found = torch.empty_like(left)
    return 2 * side**3 / _seconds(device, lambda: torch.mm(left, right, out=found))


def synchronize(device: torch.device) -> None:
    """Wait for what the device still does; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Least wall time of some calls after a first one."""
    work()
    taken = []
    for _ in range(_PROBES):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)
