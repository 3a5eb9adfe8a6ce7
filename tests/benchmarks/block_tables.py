"""The figures of `block.py` as JSON values, and as the lines it prints."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from block_floor import Probes, Rates, floors, traffic, work_of
from block_plan import BlockRequest
from block_solve import OURS, SOLVE, SolveRow
from block_stopwatch import WATCHED, Stopwatch

from quantlib.job.activations import CALIBRATION, cells_of
from quantlib.job.plan import Plan
from quantlib.simulation.shapes import BlockShape

_GIB = 2**30
# Stages that are no work of their own besides their parts; the others are parts too.
_DIVIDED = ("capture", "solve", "pack", "propagate")
_REST = "rest"


def block_figures(
    request: BlockRequest,
    plan: Plan,
    shape: BlockShape,
    rates: Rates,
    watch: Stopwatch,
    linears: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything about a block.

    Args:
        plan: Of the request.
        linears: Rows of the report.
    """
    work = work_of(shape, request.tokens, request.sequence_length)
    floor = floors(work, rates, getattr(torch, plan.compute_dtype))
    bytes_s = traffic(shape, len(cells_of(plan)[CALIBRATION]), rates)
    # One forward must be, and with quantized propagation another; each pass takes one.
    others = int(request.propagation == "quantized")
    floor["forward"] *= 1 + others
    flops = {name: getattr(work, name) for name in ("forward", "statistics", "factor", "columns")}
    flops["forward"] *= watch.stages["capture"].calls + others
    seconds = _part_seconds(watch)
    total, least = sum(spent.seconds for spent in watch.stages.values()), sum(floor.values())
    parts = [
        {
            "part": part,
            "seconds": taken,
            "flops": flops.get(part),
            "floor_s": floor.get(part),
            "times_floor": taken / floor[part] if part in floor else None,
            "traffic_s": bytes_s.get(part),
        }
        for part, taken in seconds.items()
    ]
    hours = None if request.model.num_alike is None else total * request.model.num_alike / 3600
    return {
        "request": dataclasses.asdict(request),
        "compute_dtype": plan.compute_dtype,
        "work": dataclasses.asdict(work),
        "parts": parts,
        "stages": {name: dataclasses.asdict(spent) for name, spent in watch.stages.items()},
        "block": {"seconds": total, "floor_s": least, "times_floor": total / least},
        "blocks_alike": request.model.num_alike,
        "device_hours": hours,
        "linears": len(linears),
        "mean_relative_error": sum(row["relative_error"] for row in linears) / len(linears),
        "fallbacks": sum(row["fallback"] is not None for row in linears),
    }


def probe_lines(probes: Probes) -> list[str]:
    """What the device was found to do; a CPU's rates are alike."""
    lines = []
    for rates, kind in {probes.burst: "burst", probes.sustained: "sustained"}.items():
        lines.append(
            f"{kind}: products bf16 {rates.bf16 / 1e12:.3g} TFLOP/s, fp32 {rates.fp32 / 1e12:.3g} TFLOP/s;"
            f" copies on the device {rates.copied / 1e9:.0f} GB/s, from the host"
            f" {rates.from_host / 1e9:.0f}, to it {rates.to_host / 1e9:.0f}"
        )
    return lines


def block_table(figures: Mapping[str, Any]) -> list[str]:
    """A line a stage, a line a part, and what it comes to."""
    request, block = figures["request"], figures["block"]
    lines = [
        "",
        f"{request['model']['name']}: {request['sequences']} x {request['sequence_length']} tokens,"
        f" {request['scheme']} in groups of {request['group_size']}, propagation {request['propagation']}",
        f"{'stage':22}{'s':>10}{'GPU GiB':>10}{'host GiB':>10}",
    ]
    for name, spent in figures["stages"].items():
        peaks = f"{_gib(spent['device_bytes']):>10}{_gib(spent['host_bytes']):>10}"
        lines.append(f"{name:22}{spent['seconds']:10.3f}{peaks}")
    lines += ["", f"{'part':22}{'s':>10}{'TFLOP/s':>10}{'floor s':>10}{'x floor':>10}{'bytes s':>10}"]
    for part in figures["parts"]:
        rate = part["flops"] / part["seconds"] / 1e12 if part["flops"] and part["seconds"] else None
        columns = (rate, part["floor_s"], part["times_floor"], part["traffic_s"])
        lines.append(f"{part['part']:22}{part['seconds']:10.3f}" + "".join(map(_number, columns)))
    lines.append(
        f"{'block':22}{block['seconds']:10.3f}{'':10}{_number(block['floor_s'])}"
        f"{_number(block['times_floor'])}"
    )
    lines += [
        "",
        _model_line(figures),
        f"{figures['linears']} linears, mean relative error {figures['mean_relative_error']:.5f},"
        f" fallbacks {figures['fallbacks']}",
    ]
    return lines


def solve_figures(rows: Sequence[SolveRow], watches: Sequence[Stopwatch]) -> dict[str, Any]:
    """Of solvers on single weights.

    Args:
        watches: Those of our own rows, in order.
    """
    parts = [
        {part: spent.seconds for (_, part), spent in watch.parts.items()} | {_REST: watch.rest(SOLVE)}
        for watch in watches
    ]
    return {"rows": [dataclasses.asdict(row) for row in rows], "our_parts": parts}


def solve_table(figures: Mapping[str, Any]) -> list[str]:
    """A line a solver and weight; below ours what it consists of."""
    head = f"{'weight':>14}  {'tool':16}{'s':>10}{'x floor':>10}{'error':>10}{'GPU GiB':>10}"
    lines, parts = ["", head], iter(figures["our_parts"])
    for row in figures["rows"]:
        place = f"{row['rows']} x {row['columns']}"
        start = f"{place:>14}  {row['tool']:16}"
        if row["seconds"] is None:
            lines.append(f"{start}  {row['said']}")
            continue
        columns = "".join(map(_number, (row["seconds"], row["times_floor"], row["error"])))
        lines.append(f"{start}{columns}{_gib(row['device_bytes']):>10}")
        if row["tool"] == OURS:
            its_parts = next(parts)
            lines += [f"{'':16}  {part:14}{_number(seconds)}" for part, seconds in its_parts.items()]
    return lines


def _part_seconds(watch: Stopwatch) -> dict[str, float]:
    """Part -> seconds in all stages; stages without parts, and what is in none."""
    found = {name: spent.seconds for name, spent in watch.stages.items() if name not in _DIVIDED}
    for part in WATCHED:
        seconds = [spent.seconds for (_, name), spent in watch.parts.items() if name == part]
        if seconds:
            found[part] = sum(seconds)
    found[_REST] = sum(watch.rest(name) for name in watch.stages if name in _DIVIDED)
    return found


def _model_line(figures: Mapping[str, Any]) -> str:
    if figures["device_hours"] is None:
        return "whole model: not said, as the block is cut"
    hours = f"{figures['device_hours']:.3g} hours of the device"
    return f"whole model: {figures['blocks_alike']} such blocks, {hours}"


def _number(value: float | None) -> str:
    return f"{'':10}" if value is None else f"{value:10.3g}"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / _GIB:.2f}"
