"""What this machine is, as far as it may change a result."""

import os
import re
import time
from collections.abc import Mapping
from typing import Any

import torch

from quantlib.errors import PlanMismatchError, RecipeError

# Of a GPU, for the driver's context, kernels, workspaces of libraries and what lies idle between tensors.
_LIBRARY_BYTES = 2 << 30


def device_kind(wanted: str | None) -> str:
    """``cpu-avx2``, ``cuda-sm90-nvidia-h200``, ...; results are only promised to repeat within one kind.

    Models of GPU of one architecture are different kinds: libraries choose kernels by a GPU's size too.

    Args:
        wanted: ``cpu`` or ``cuda``; None takes cuda where there is one.

    Raises:
        RecipeError: cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "device cuda was asked for, but PyTorch finds none here; choose cpu, or look at the driver",
            option="device",
        )
    if wanted != "cpu" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        model = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        return f"cuda-sm{major}{minor}-{model}"
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower().replace(' ', '-')}"


def may_share(kind: str, found: str, *, mixed_gpus: bool) -> bool:
    """Whether a device may do work of a job that was planned for another.

    Args:
        kind: The plan's, from `device_kind`.
        found: This machine's.
        mixed_gpus: Whether GPUs of several kinds are allowed.

    >>> may_share("cuda-sm90-nvidia-h200", "cuda-sm80-nvidia-a100-sxm4-80gb", mixed_gpus=True)
    True
    """
    return found == kind or (mixed_gpus and kind.startswith("cuda") and found.startswith("cuda"))


def refuse_other_device(kind: str, *, mixed_gpus: bool) -> str:
    """Make sure that this process computes on the kind of device a plan was made for; gives its kind.

    Args:
        kind: The plan's.
        mixed_gpus: Whether another kind of GPU will do.

    Raises:
        PlanMismatchError: It does not: its results might differ in their last bits.
    """
    found = device_kind(kind.partition("-")[0])
    if not may_share(kind, found, mixed_gpus=mixed_gpus):
        ways = ", or allow mixed_gpus" if found.startswith("cuda") else ""
        raise PlanMismatchError(
            f"the job was planned for {kind}, this worker has {found}; use one kind of device for one job,"
            f" with gpu_model or worker_labels{ways}",
            device_kind=found,
        )
    return found


def device_bytes(kind: str) -> int | None:
    """Memory of the GPU here that tensors may take; None where a kind of device has no memory of its own.

    The same for every GPU of a kind, whatever else is on it: what is done at a time follows from it.
    """
    if not kind.startswith("cuda"):
        return None
    return torch.cuda.get_device_properties(0).total_memory - _LIBRARY_BYTES


def compute_dtype(config: Mapping[str, Any], kind: str) -> str:
    """Name of the dtype in which a model's blocks run: its own where this device is fast in it, else fp32.

    Args:
        config: Values of ``config.json``.
        kind: From `device_kind`. A CPU without AMX emulates bf16 products at a seventh of the fp32 rate.
    """
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    is_gpu = kind.startswith("cuda")
    if stored == "bfloat16" and (is_gpu or torch.cpu._is_amx_tile_supported()):
        return "bfloat16"
    return "float16" if stored == "float16" and is_gpu else "float32"


def cell_tokens(kind: str) -> int:
    """Tokens in a cell: enough to fill matrix products, few enough that its activations stay small."""
    return 16384 if kind.startswith("cuda") else 4096


def batch_tokens(kind: str) -> int:
    """Tokens that go through a block at a time: on a CPU few, so that activations stay in its cache."""
    return cell_tokens(kind) if kind.startswith("cuda") else 1024


def keep_fp32_products() -> None:
    """Have this process multiply fp32 in fp32 from now on, and add up products of 16 bits in fp32.

    Whatever was set before: with second moments that are rounded to TF32 a tenth of the codes are others.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


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
