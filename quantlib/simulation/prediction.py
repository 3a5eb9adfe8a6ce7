"""A prediction in numbers and in words: what a job would take on a cluster, and what that rests on."""

from typing import Any

from quantlib.errors import RecipeError
from quantlib.job.options import JobOptions
from quantlib.job.report_figures import duration, percent, size
from quantlib.simulation.costs import Costs, Workload
from quantlib.simulation.hardware import Cluster
from quantlib.simulation.memory import gpu_memory, node_sums_bytes
from quantlib.simulation.shapes import ModelShape
from quantlib.simulation.simulate import simulate
from quantlib.simulation.timeline import IDLE

# What a GPU works on at a time (`quantlib.machine.cell_tokens`).
CELL_TOKENS = 16384
WORDS = {
    "capture": "capturing",
    "solve": "factoring and solving",
    "evaluate": "evaluating",
    "copy": "copies between GPU and host",
    "read": "storage reads",
    "write": "storage writes",
    "network": "the network",
    IDLE: "fewer than half of the GPUs have work",
}
_NOT_COUNTED = (
    "not counted: norms, softmax, adding sums of cells, searching scales, packing, calls, starting workers;"
    " a real run takes longer"
)


def workload_of(options: JobOptions, shape: ModelShape) -> Workload:
    """What a request does to a model; what does not calibrate has no calibration sequences.

    Raises:
        RecipeError: It says how many workers there are.
    """
    if options.workers is not None:
        raise RecipeError(
            f"the workers of a cluster are its GPUs, found workers {options.workers}; leave it out and name a"
            " cluster of so many GPUs",
            option="workers",
        )
    calibrates = any(block.groups for block in shape.blocks)
    return Workload(
        sequences=options.sequences if calibrates else 0,
        evaluation_sequences=options.evaluation_sequences if options.evaluation else 0,
        sequence_length=options.sequence_length,
        sequences_per_cell=max(1, CELL_TOKENS // options.sequence_length),
        propagation=options.propagation or "original",
        correct_targets=bool(options.correct_targets),
        descent_passes=options.descent_passes or 0,
        checkpoint_every=options.checkpoint_every,
    )


def parse_price(text: str | None) -> float | None:
    """What a GPU-hour costs, in any currency.

    Raises:
        RecipeError: No number above 0.

    >>> parse_price("2.5")
    2.5
    """
    if text is None:
        return None
    try:
        price = float(text)
    except ValueError:
        price = 0.0
    if not 0 < price < float("inf"):
        raise RecipeError(
            f"price must be what a GPU-hour costs, a number above 0; found {text!r}", option="price"
        )
    return price


def predict(
    shape: ModelShape, workload: Workload, cluster: Cluster, *, price: float | None = None
) -> dict[str, Any]:
    """Simulate a job; gives JSON values.

    Args:
        price: Of a GPU-hour.

    Returns:
        ``seconds``, ``gpu_hours``, ``cost``; ``bottleneck`` and ``seconds_by_cause``, which add up to the
        time; ``computing_share`` of the GPUs' time; bytes of storage and network; memory; ``assumptions``.
    """
    costs = Costs(shape=shape, workload=workload, rates=cluster.rates)
    outcome = simulate(shape, workload, cluster)
    causes = dict(sorted(outcome.timeline.causes().items(), key=lambda found: -found[1]))
    gpu_seconds = outcome.wall_s * cluster.num_workers
    return {
        "model": shape.name,
        "gpu": cluster.kind.name,
        "gpus": cluster.num_workers,
        "nodes": cluster.num_nodes,
        "seconds": outcome.wall_s,
        "gpu_hours": gpu_seconds / 3600,
        "cost": None if price is None else gpu_seconds / 3600 * price,
        "bottleneck": next(iter(causes)),
        "seconds_by_cause": causes,
        "computing_share": outcome.timeline.busy_s / gpu_seconds,
        "storage_bytes_read": round(outcome.read_bytes),
        "storage_bytes_written": round(outcome.written_bytes),
        "network_bytes": round(outcome.network_bytes),
        "gpu_memory_bytes": gpu_memory(costs, cluster.num_workers),
        "gpu_memory_size_bytes": cluster.kind.memory_bytes,
        "node_sums_bytes": node_sums_bytes(costs, cluster),
        "moved_cells": outcome.moved_cells,
        "assumptions": _assumptions(workload, cluster),
    }


def format_prediction(found: dict[str, Any]) -> str:
    """The numbers of `predict` for a terminal."""
    cost = "" if found["cost"] is None else f", cost {found['cost']:,.2f}"
    nodes = f"{found['nodes']} node" + "s" * (found["nodes"] > 1)
    causes = [
        f"{WORDS[cause]} {percent(seconds / found['seconds'])}"
        for cause, seconds in found["seconds_by_cause"].items()
        if seconds >= 0.01 * found["seconds"]
    ]
    lines = [
        f"{found['model']} on {found['gpus']} x {found['gpu']} ({nodes}), predicted, not measured:",
        f"{duration(found['seconds'])}, {found['gpu_hours']:.2f} GPU-hours{cost}",
        f"bottleneck: {causes[0]}" + "".join(f"; {cause}" for cause in causes[1:]),
        f"GPUs compute {percent(found['computing_share'])} of the time",
        f"storage {size(found['storage_bytes_read'])} read, {size(found['storage_bytes_written'])} written;"
        f" network between nodes {size(found['network_bytes'])}",
        *_memory_lines(found),
        "assumed:",
        *(f"  {assumption}" for assumption in found["assumptions"]),
    ]
    return "\n".join(lines)


def _memory_lines(found: dict[str, Any]) -> list[str]:
    memory, limit = found["gpu_memory_bytes"], found["gpu_memory_size_bytes"]
    fits = "of" if memory["total"] <= limit else "more than its"
    parts = ", ".join(f"{name} {size(part)}" for name, part in memory.items() if name != "total")
    return [
        f"memory of a GPU about {size(memory['total'])}, {fits} {size(limit)}: {parts}",
        f"sums of input groups in the memory of a node: up to {size(found['node_sums_bytes'])}",
    ]


def _assumptions(work: Workload, cluster: Cluster) -> list[str]:
    rates, kind = cluster.rates, cluster.kind
    evaluation = f", {work.evaluation_sequences} held out" if work.evaluation_sequences else ""
    calibration = f"{work.sequences} sequences of {work.sequence_length} tokens{evaluation}"
    targets = ", targets corrected" if work.correct_targets else ""
    return [
        f"{calibration}, {work.sequences_per_cell} a cell, {work.propagation} activations{targets}",
        f"a GPU: {_tera(rates.matrix_flops)} of {_tera(kind.matrix_flops)} peak TFLOP/s in bf16 products,"
        f" {_tera(rates.factor_flops)} in factors and {_tera(rates.solve_flops)} in fp32 solves"
        f" of {_tera(kind.vector_flops)} peak, {rates.column_s * 1e6:g} us a column,"
        f" {size(rates.host_bytes_per_s)}/s to and from the host",
        f"a node: storage {size(cluster.storage_bytes_per_s)}/s and network"
        f" {size(cluster.network_bytes_per_s)}/s, each way",
        "experts see equal parts of the tokens; weights are stored in bf16; nothing fails",
        _NOT_COUNTED,
    ]


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g}"
