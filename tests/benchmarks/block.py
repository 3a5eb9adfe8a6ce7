"""One random block of a model's true shape through the real code: what each stage takes, beside its floor.

    python tests/benchmarks/block.py --shape llama-3.1-405b --sequences 512 --device cuda
    python tests/benchmarks/block.py --shape llama-3.1-70b --sequences 2 --slice 1024 --device cpu
    python tests/benchmarks/block.py --solve 8192x28672 --device cuda --peers

It needs no checkpoint and no storage, and of Python packages PyTorch, transformers, safetensors, fsspec and
pyarrow alone. What is compiled is compiled in a small block before. The floor is the operations of the
forward, the statistics, the factors and the solves at the rates of matrix products, and weights and packed
tensors at the rate of copies, all measured in the same run.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from block_floor import Rates, measured_rates
from block_methods import check_line, checked_methods
from block_models import NAMES, block_model, stored_shapes, tiny_model
from block_peers import PEERS
from block_plan import BlockRequest, settings_with
from block_run import run_request
from block_solve import SolveProblem, SolveRow, our_row, peer_row, solve_problem
from block_stopwatch import WATCHED, Stopwatch
from block_tables import block_figures, block_table, probe_lines, solve_figures, solve_table
from block_targets import block_targets, solve_targets

from quantlib.job.plan import Plan
from quantlib.machine import device_kind, keep_fp32_products
from quantlib.methods.whole_solve import Method
from quantlib.schemes import scheme_from_name
from quantlib.simulation.config_shapes import shape_of_config
from quantlib.simulation.shapes import BlockShape

_WARM_UP: dict[str, Any] = {"sequences": 1, "sequence_length": 512}
_WARM_UP_SOLVE = (512, 1024)
Methods = Mapping[str, Method]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and perhaps write what was asked for."""
    asked = _asked(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    keep_fp32_products()
    request = _request(asked) if asked.shape else None
    probes = measured_rates(device)
    rates = probes.sustained
    methods, check = checked_methods(_widest(asked, request), device)
    found: dict[str, Any] = {
        "device": device_kind(asked.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rates": dataclasses.asdict(rates),
        "burst_rates": dataclasses.asdict(probes.burst),
        "cholesky_check": None if check is None else check.to_dict(),
    }
    print(f"{found['device']}, PyTorch {found['torch']}, {found['threads']} threads")
    print(*probe_lines(probes), check_line(check), sep="\n")
    weights = [asked.solve] if asked.solve else []
    if request is not None:
        watched = {} if asked.stages_only else WATCHED
        found["block"] = _measured_block(request, rates, methods, watched)
        print(*block_table(found["block"]), "", *block_targets(found["block"]), sep="\n")
        weights = _weights_of(request) if asked.peers else []
    if weights:
        found["solves"] = _measured_solves(weights, asked, rates, methods)
        print(*solve_table(found["solves"]), *solve_targets(found["solves"]), sep="\n")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _asked(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=NAMES, help="a block of this model")
    what.add_argument("--solve", type=_size, metavar="RxC", help="factor and solve of one weight alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--group-size", type=int, help="by default 128, of smollm2 64")
    parser.add_argument("--propagation", choices=("original", "quantized"), default="original")
    parser.add_argument(
        "--slice", type=int, metavar="N", help="of a Llama: features inside attention and MLP"
    )
    parser.add_argument("--experts", type=int, metavar="N", help="of DeepSeek-V3: so many of its experts")
    parser.add_argument("--passes", type=int, default=1, help="forwards that share out the input groups")
    parser.add_argument(
        "--height", type=int, metavar="N", help="most rows of a tile; by default the product's choice"
    )
    parser.add_argument("--stages-only", action="store_true", help="do not wait for the GPU inside stages")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another option of a job, such as descent_passes=2",
    )
    parser.add_argument("--tokens", type=int, help="behind the Hessian of --solve; by default 2 a column")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--peers", action="store_true", help="other tools' solvers on the same weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    asked = parser.parse_args(arguments)
    if asked.group_size is None:
        # 128 do not divide the 576 columns of smollm2.
        asked.group_size = 64 if asked.shape == "smollm2" else 128
    return asked


def _request(asked: argparse.Namespace) -> BlockRequest:
    return BlockRequest(
        model=block_model(asked.shape, inner=asked.slice, experts=asked.experts),
        device=asked.device,
        sequences=asked.sequences,
        sequence_length=asked.sequence_length,
        group_size=asked.group_size,
        propagation=asked.propagation,
        passes=asked.passes,
        height=asked.height,
        options=dict(asked.set),
    )


def _measured_block(
    request: BlockRequest, rates: Rates, methods: Methods, watched: Mapping[str, str]
) -> dict[str, Any]:
    small = dataclasses.replace(request, model=tiny_model(request.model), **_WARM_UP)
    _run(small, methods, watched)
    watch, plan, linears = _run(request, methods, watched)
    return block_figures(request, plan, _shape(request), rates, watch, linears)


def _run(
    request: BlockRequest, methods: Methods, watched: Mapping[str, str]
) -> tuple[Stopwatch, Plan, list[dict[str, Any]]]:
    watch = Stopwatch(torch.device(request.device))
    with watch.watching(watched):
        return watch, *run_request(request, watch, methods)


def _shape(request: BlockRequest) -> BlockShape:
    scheme = scheme_from_name(request.scheme, request.group_size)
    (block,) = shape_of_config(request.model.name, request.model.config, scheme).blocks
    return block


def _widest(asked: argparse.Namespace, request: BlockRequest | None) -> int:
    """Columns of the largest factor that will be wanted."""
    if request is None:
        return asked.solve[1]
    return max(group.columns for group in _shape(request).groups)


def _weights_of(request: BlockRequest) -> list[tuple[int, int]]:
    """Sizes of the linears of a block, each once."""
    sizes = [
        shape for name, shape in stored_shapes(request.model.config).items() if name.endswith("_proj.weight")
    ]
    return list(dict.fromkeys((rows, columns) for rows, columns in sizes))


def _measured_solves(
    weights: list[tuple[int, int]], asked: argparse.Namespace, rates: Rates, methods: Methods
) -> dict[str, Any]:
    kind = {"device": torch.device(asked.device), "group_size": asked.group_size}
    # On a GPU a size may have kernels of its own, compiled when they are first called.
    repeats = 2 if asked.device == "cuda" else 1
    rows, watches = [], []
    ours = {"settings": settings_with(dict(asked.set)), "methods": methods, "height": asked.height}
    _solved(solve_problem(*_WARM_UP_SOLVE, **kind), rates, **ours)
    for size in weights:
        problem = solve_problem(*size, tokens=asked.tokens, **kind)
        row, watch = [_solved(problem, rates, **ours) for _ in range(repeats)][-1]
        rows.append(row)
        watches.append(watch)
        if asked.peers:
            rows += [peer_row(tool, problem, rates, repeats=repeats) for tool in PEERS]
        del problem
    return solve_figures(rows, watches)


def _solved(problem: SolveProblem, rates: Rates, **ours: Any) -> tuple[SolveRow, Stopwatch]:
    watch = Stopwatch(problem.weight_RC.device)
    keep_fp32_products()  # whatever another tool has left behind
    with watch.watching():
        return our_row(problem, watch, rates, **ours), watch


def _setting(text: str) -> tuple[str, Any]:
    """A value that is no JSON is a text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


if __name__ == "__main__":
    sys.exit(main())
