"""What a plan will cost, from shapes alone: bytes, memory of a worker, rough time.

Formulae: `algorithms` of layer-wise quantization count 2 flops a weight and token for a forward, columns^2 a
token for the lower half of a gram matrix, columns^3 / 3 for a factor and rows * columns^2 for a solve or a
pass of descent. Corrected targets add a stream, a whole product of two inputs and a factor with its solve.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from quantlib.checkpoint.index import WEIGHT_FILES
from quantlib.job.accounts import account_lines
from quantlib.job.expert_groups import token_shares
from quantlib.job.memory import MemoryPlan
from quantlib.job.options import ALL_EXPERTS
from quantlib.job.plan import BlockPlan, Plan
from quantlib.job.scheme_defaults import FOLLOWING
from quantlib.job.text_sources import described as described_text
from quantlib.schemes import groups_said
from quantlib.storage import uri_name


def describe_plan(
    plan: Plan,
    memory: MemoryPlan,
    *,
    num_workers: int,
    flops_per_second: float,
    packed_with: Sequence[str] = (),
) -> dict[str, Any]:
    """A plan in numbers, as JSON values.

    Args:
        memory: How it fits.
        flops_per_second: Of one worker.
        packed_with: Outputs that are packed from the same codes.

    Returns:
        Counts, bytes in and out, ``memory_bytes`` by place and purpose, ``rough_seconds`` of computation.
    """
    shards = {name: size for name, (size, _) in plan.source_objects.items() if name.endswith(WEIGHT_FILES)}
    tokens = _tokens(plan)
    flops = sum(_block_flops(plan, block, tokens) for block in plan.blocks)
    return {
        "source": plan.source,
        "source_format": plan.source_format,
        "output": plan.output,
        "packed_with": list(packed_with),
        "model_type": plan.model_type,
        "scheme": plan.options["scheme"],
        "group_size": plan.options["group_size"],
        "method": plan.options["method"],
        "format": plan.options["format"],
        "target": plan.options["target"],
        "tensor_parallel": plan.options["tensor_parallel"],
        "solver": {name: plan.options[name] for name in FOLLOWING},
        "outlier_columns": plan.options["outlier_columns"],
        "outlier_weights": plan.options["outlier_weights"],
        "blocks": len(plan.blocks),
        "units": len(plan.units),
        "shards": [unit.shard for unit in plan.units],
        "linears_quantized": sum(1 for b in plan.blocks for linear in b.linears if linear.scheme),
        "linears_kept": [linear.name for b in plan.blocks for linear in b.linears if not linear.scheme]
        + list(plan.kept_linears),
        "tensors": [dataclasses.asdict(account) for account in plan.accounts],
        "calibration_tokens": tokens["calibration"],
        "evaluation_tokens": tokens["evaluation"],
        "calibration_texts": [dataclasses.asdict(text) for text in plan.calibration_texts],
        "evaluation_texts": [dataclasses.asdict(text) for text in plan.evaluation_texts],
        "bytes_in": sum(shards.values()),
        "bytes_out": plan.output_bytes,
        "workers": num_workers,
        "threads_per_worker": plan.threads,
        "device_kind": plan.device_kind,
        "compute_dtype": plan.compute_dtype,
        "memory_bytes": {
            "worker": dict(memory.worker),
            "device": dict(memory.device),
            "object_store": dict(memory.store),
            "unsliced": memory.unsliced_bytes,
        },
        "most_slices": max(len(passes) for passes in memory.slices),
        "one_block_at_a_time": not memory.pipelines,
        "late_weights": memory.has_late_weights,
        "waiting_activations_bytes": memory.waiting_bytes,
        "rough_seconds": flops / flops_per_second / num_workers,
        "identity": plan.identity(),
    }


def format_plan(described: dict[str, Any]) -> str:
    """The numbers of `describe_plan` for a terminal."""
    lines = [
        f"{described['source']} ({described['source_format']})  ->  {described['output']}",
        f"{described['model_type']}: {described['blocks']} blocks,"
        f" {described['linears_quantized']} linears to {described['scheme']},"
        f" {groups_said(described['group_size'])}, by {described['method']}, {described['format']}",
        *_target_lines(described),
        *_solved_once_lines(described),
        *_solver_lines(described),
        *account_lines(described["tensors"]),
        f"{described['units']} units in {len(described['shards'])} shards,"
        f" {_mb(described['bytes_in'])} in, {_mb(described['bytes_out'])} out",
        f"{described['calibration_tokens']} calibration tokens,"
        f" {described['evaluation_tokens']} evaluation tokens",
        *(f"calibration text: {described_text(text)}" for text in described["calibration_texts"]),
        *(f"evaluation text: {described_text(text)}" for text in described["evaluation_texts"]),
        f"{described['workers']} worker(s) of {described['threads_per_worker']} threads on"
        f" {described['device_kind']} in {described['compute_dtype']}",
        *_memory_lines(described),
        f"computation about {described['rough_seconds']:.0f} s at the rate measured here",
    ]
    return "\n".join(lines)


def _memory_lines(described: dict[str, Any]) -> list[str]:
    places = {"worker": "a worker", "device": "its GPU", "object_store": "the object store of a node"}
    lines = []
    for place, words in places.items():
        needs = {name: size for name, size in described["memory_bytes"][place].items() if size}
        parts = ", ".join(f"{name} {_mb(size)}" for name, size in needs.items())
        lines += [f"memory of {words} at most about {_mb(sum(needs.values()))}: {parts}"] * bool(needs)
    measures = ["one block at a time"] * described["one_block_at_a_time"]
    measures += ["weights made as a linear runs"] * described["late_weights"]
    if described["waiting_activations_bytes"]:
        measures.append(f"{_mb(described['waiting_activations_bytes'])} of activations wait outside")
    if described["most_slices"] > 1:
        measures.append(f"up to {described['most_slices']} passes of the cells through a block")
    return lines + [f"to fit: {', '.join(measures)}"] * bool(measures)


def _target_lines(described: dict[str, Any]) -> list[str]:
    if described["target"] is None:
        return []
    number = described["tensor_parallel"]
    devices = f" on {number} devices" if number > 1 else ""
    return [f"checked for {described['target']}{devices}: breaks none of its rules that are known here"]


def _solved_once_lines(described: dict[str, Any]) -> list[str]:
    names = ", ".join(map(uri_name, described["packed_with"]))
    return [f"of the same codes as {names}, which are solved once"] if names else []


def _solver_lines(described: dict[str, Any]) -> list[str]:
    if described["method"] == "rtn":
        return []
    solver = described["solver"]
    words = [f"calibrated on {solver['propagation']} activations"]
    words += [f"scales by {solver['scale_search']}"]
    words += ["with corrected targets"] * solver["correct_targets"]
    words += [f"{solver['descent_passes']} passes of descent"] * (solver["descent_passes"] > 0)
    words += ["scales refitted"] * solver["refit_scales"]
    lines = [", ".join(words)]
    if described["outlier_columns"]:
        lines.append(
            f"{described['outlier_columns']} columns of every linear by gptq are kept beside its codes, which"
            " no serving engine reads: one that takes the files reads the codes of these columns"
        )
    if described["outlier_weights"]:
        lines.append(
            f"{described['outlier_weights']} of 1,000 weights of every linear by gptq are kept beside its"
            " codes, which no serving engine reads: one that takes the files reads the codes of these weights"
        )
    return lines


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _tokens(plan: Plan) -> dict[str, int]:
    length = plan.options["sequence_length"]
    return {
        "calibration": plan.options["sequences"] * length if plan.calibration_digest else 0,
        "evaluation": plan.options["evaluation_sequences"] * length if plan.evaluation_digest else 0,
    }


def _block_flops(plan: Plan, block: BlockPlan, tokens: dict[str, int]) -> float:
    shares = token_shares(plan, block)
    weights = sum(shares[linear.name] * linear.rows * linear.columns for linear in block.linears)
    sees_all = plan.options["calibration_routing"] == ALL_EXPERTS
    corrects = plan.options["correct_targets"]
    streams = 1 + (plan.options["propagation"] == "quantized") + corrects
    passes = tokens["calibration"] * streams
    flops = 2.0 * weights * (passes + 2 * tokens["evaluation"])
    columns = {linear.name: linear.columns for linear in block.linears}
    for group in block.input_groups:
        n = columns[group[0]]
        seen = tokens["calibration"] * (1.0 if sees_all else shares[group[0]])
        flops += seen * n**2 * (3 if corrects else 1) + n**3 / 3 * (5 if corrects else 1)
    solved = [linear for linear in block.linears if linear.method == "gptq"]
    solves = 1 + plan.options["descent_passes"]
    return flops + solves * sum(2.0 * linear.rows * linear.columns**2 for linear in solved)
