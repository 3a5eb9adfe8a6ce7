"""What a block cannot cost less than: operations and bytes counted from its shape, at rates measured here.

T tokens, n columns of an input group, m rows of its linears. A forward is 2 flops a weight and token, and
2 * length * width a token for causal attention; the lower half of X^T X is n**2 a token; a factor n**3 / 3; a
solve m * n**2. Weights come from the host once, and packed tensors go there.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantlib.simulation.shapes import BlockShape

_PROBES = 5
# Of calls at the pace of the best of those few: half a second at the least, as a warm GPU is no faster.
_SUSTAINED_S = {"cuda": 0.6, "cpu": 0.0}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Rates of this device.

    Attributes:
        burst: Of the best of a few calls, on a GPU of a thousandth of a second and at clocks it may not keep.
        sustained: The mean of half a second of calls, as long after the first one; of a CPU as ``burst``.
    """

    burst: Rates
    sustained: Rates


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


def measured_rates(device: torch.device) -> Probes:
    """Rates of products and copies of random data, beside which others may have been at work."""
    burst, sustained = {}, {}
    for name, (amount, call) in _probes(device).items():
        least, mean = seconds_of_calls(device, call, _SUSTAINED_S[device.type])
        burst[name], sustained[name] = amount / least, amount / mean
    return Probes(burst=_rates(burst), sustained=_rates(sustained))


def _rates(found: dict[str, float]) -> Rates:
    return Rates(**{"from_host": found["copied"], "to_host": found["copied"], **found})


def _probes(device: torch.device) -> dict[str, tuple[float, Callable[[], object]]]:
    """Rate -> flops or bytes of a call, and the call."""
    side, size = _GEMM_SIDE[device.type], _COPIED_BYTES[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    probes: dict[str, tuple[float, Callable[[], object]]] = {
        "bf16": (2 * side**3, _product(device, torch.bfloat16, side)),
        "fp32": (2 * side**3, _product(device, torch.float32, side)),
        "copied": (2 * size, lambda: target.copy_(source)),
    }
    if device.type == "cuda":
        pinned = torch.empty(size // 4, pin_memory=True)
        probes["from_host"] = (size, lambda: target.copy_(pinned, non_blocking=True))
        probes["to_host"] = (size, lambda: pinned.copy_(source, non_blocking=True))
    return probes


def _product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], object]:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=found)


def synchronize(device: torch.device) -> None:
    """Wait for what the device still does; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of_calls(
    device: torch.device,
    call: Callable[[], object],
    sustained_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Wall time of a call: the least of a few after a first one, and the mean of many.

    Args:
        sustained_s: Time for as many calls as take that long at the pace of the best one, made one after the
            other without waiting; as many were made before. With 0 the least stands for the mean.
    """

    def taken(count: int) -> float:
        synchronize(device)
        started = clock()
        for _ in range(count):
            call()
        synchronize(device)
        return clock() - started

    call()
    least = min(taken(1) for _ in range(_PROBES))
    count = math.ceil(sustained_s / least)
    if not count:
        return least, least
    taken(count)
    return least, taken(count) / count
