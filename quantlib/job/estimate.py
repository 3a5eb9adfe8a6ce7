"""What a plan will cost, from shapes alone: bytes, memory of a worker, rough time.

Formulae: `algorithms` of layer-wise quantization count 2 flops a weight and token for a forward, columns^2 a
token for the lower half of a gram matrix, columns^3 / 3 for a factor and rows * columns^2 for a solve or a
pass of descent. Corrected targets add a stream, a whole product of two inputs and a factor with its solve.
"""

from typing import Any

from quantlib.checkpoint.layout import layout_shard
from quantlib.job.plan import BlockPlan, Plan, UnitPlan
from quantlib.job.scheme_defaults import FOLLOWING

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def describe_plan(plan: Plan, *, num_workers: int, flops_per_second: float) -> dict[str, Any]:
    """A plan in numbers, as JSON values.

    Args:
        flops_per_second: Of one worker.

    Returns:
        Counts, bytes in and out, ``worker_memory_bytes`` by purpose, ``rough_seconds`` of computation.
    """
    shards = {name: size for name, (size, _) in plan.source_objects.items() if name.endswith(".safetensors")}
    memory = _worker_memory(plan, num_workers)
    tokens = _tokens(plan)
    flops = sum(_block_flops(plan, block, tokens) for block in plan.blocks)
    return {
        "source": plan.source,
        "output": plan.output,
        "model_type": plan.model_type,
        "scheme": plan.options["scheme"],
        "group_size": plan.options["group_size"],
        "method": plan.options["method"],
        "format": plan.options["format"],
        "solver": {name: plan.options[name] for name in FOLLOWING},
        "blocks": len(plan.blocks),
        "units": len(plan.units),
        "shards": [unit.shard for unit in plan.units],
        "linears_quantized": sum(1 for b in plan.blocks for linear in b.linears if linear.scheme),
        "linears_kept": [linear.name for b in plan.blocks for linear in b.linears if not linear.scheme]
        + list(plan.kept_linears),
        "calibration_tokens": tokens["calibration"],
        "evaluation_tokens": tokens["evaluation"],
        "bytes_in": sum(shards.values()),
        "bytes_out": sum(_unit_bytes(unit) for unit in plan.units),
        "workers": num_workers,
        "threads_per_worker": plan.threads,
        "device_kind": plan.device_kind,
        "compute_dtype": plan.compute_dtype,
        "worker_memory_bytes": {**memory, "total": sum(memory.values())},
        "rough_seconds": flops / flops_per_second / num_workers,
        "identity": plan.identity(),
    }


def format_plan(described: dict[str, Any]) -> str:
    """The numbers of `describe_plan` for a terminal."""
    memory = described["worker_memory_bytes"]
    lines = [
        f"{described['source']}  ->  {described['output']}",
        f"{described['model_type']}: {described['blocks']} blocks,"
        f" {described['linears_quantized']} linears to {described['scheme']} g{described['group_size']}"
        f" by {described['method']}, {described['format']}",
        *_solver_lines(described),
        f"kept as they are: {', '.join(described['linears_kept']) or 'nothing'}",
        f"{described['units']} units in {len(described['shards'])} shards,"
        f" {_mb(described['bytes_in'])} in, {_mb(described['bytes_out'])} out",
        f"{described['calibration_tokens']} calibration tokens,"
        f" {described['evaluation_tokens']} evaluation tokens",
        f"{described['workers']} worker(s) of {described['threads_per_worker']} threads on"
        f" {described['device_kind']} in {described['compute_dtype']}",
        f"memory of a worker about {_mb(memory['total'])}: "
        + ", ".join(f"{name} {_mb(size)}" for name, size in memory.items() if name != "total"),
        f"computation about {described['rough_seconds']:.0f} s at the rate measured here",
    ]
    return "\n".join(lines)


def _solver_lines(described: dict[str, Any]) -> list[str]:
    if described["method"] == "rtn":
        return []
    solver = described["solver"]
    words = [f"calibrated on {solver['propagation']} activations"]
    words += [f"scales by {solver['scale_search']}"]
    words += ["with corrected targets"] * solver["correct_targets"]
    words += [f"{solver['descent_passes']} passes of descent"] * (solver["descent_passes"] > 0)
    words += ["scales refitted"] * solver["refit_scales"]
    return [", ".join(words)]


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _tokens(plan: Plan) -> dict[str, int]:
    length = plan.options["sequence_length"]
    return {
        "calibration": plan.options["sequences"] * length if plan.calibration_digest else 0,
        "evaluation": plan.options["evaluation_sequences"] * length if plan.evaluation_digest else 0,
    }


def _block_flops(plan: Plan, block: BlockPlan, tokens: dict[str, int]) -> float:
    weights = sum(linear.rows * linear.columns for linear in block.linears)
    corrects = plan.options["correct_targets"]
    streams = 1 + (plan.options["propagation"] == "quantized") + corrects
    passes = tokens["calibration"] * streams
    flops = 2.0 * weights * (passes + 2 * tokens["evaluation"])
    columns = {linear.name: linear.columns for linear in block.linears}
    for group in block.input_groups:
        n = columns[group[0]]
        flops += tokens["calibration"] * n**2 * (3 if corrects else 1) + n**3 / 3 * (5 if corrects else 1)
    solved = [linear for linear in block.linears if linear.method == "gptq"]
    solves = 1 + plan.options["descent_passes"]
    return flops + solves * sum(2.0 * linear.rows * linear.columns**2 for linear in solved)


def _worker_memory(plan: Plan, num_workers: int) -> dict[str, int]:
    """Bytes by purpose, at the largest block."""
    wide = _DTYPE_BYTES[plan.compute_dtype]
    weights = max(sum(linear.rows * linear.columns for linear in b.linears) for b in plan.blocks)
    widest = max(plan.blocks, key=lambda b: sum(_columns(b)[g[0]] ** 2 for g in b.input_groups))
    squares = sum(_columns(widest)[group[0]] ** 2 for group in widest.input_groups)
    hidden = plan.blocks[0].linears[0].columns
    tokens = _tokens(plan)
    corrects = plan.options["correct_targets"]
    streams = (4 if corrects else 2) * tokens["calibration"] + 4 * tokens["evaluation"]
    # Of X^T X half a total in int64 and a cell's part in fp32; of X_ref^T X the whole of both.
    per_entry = 4 + 4 + (8 + 4) * corrects
    return {
        "block": weights * (2 * 2 + 2 * wide),
        "statistics": per_entry * squares if plan.calibration_digest else 0,
        "activations": streams * hidden * wide // num_workers,
        "packing": weights * 2,
    }


def _columns(block: BlockPlan) -> dict[str, int]:
    return {linear.name: linear.columns for linear in block.linears}


def _unit_bytes(unit: UnitPlan) -> int:
    return layout_shard(unit.tensors).size_bytes
