"""What this machine is, as far as it may change a result."""

import os
import time

import torch


def device_kind(wanted: str | None) -> str:
    """``cuda-sm90``, ``cpu-avx2``, ...; results are only promised to repeat within one kind.

    Args:
        wanted: ``cpu`` or ``cuda``; None takes cuda where there is one.
    """
    if wanted != "cpu" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"cuda-sm{major}{minor}"
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower().replace(' ', '-')}"


def computes_fast_in_bfloat16(kind: str) -> bool:
    """Whether matrix products of bf16 are faster here than those of fp32.

    A CPU without AMX emulates them at a seventh of the fp32 rate.
    """
    return kind.startswith("cuda") or torch.cpu._is_amx_tile_supported()


def default_threads(num_workers: int) -> int:
    """An equal share of this machine's cores for each worker on it."""
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


def measured_flops_per_second(threads: int) -> float:
    """Rate of an fp32 matrix product here, from a tenth of a second of trying; for rough estimates."""
    torch.set_num_threads(threads)
    size = 768
    a = torch.randn(size, size)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        torch.mm(a, a)
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)
