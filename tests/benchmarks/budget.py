"""Do jobs stay inside a budget of idle memory and 40 % of what they would take unsliced?

    python tests/benchmarks/budget.py [--jobs NAME ...] [--share 0.4] [--threads 1]

Each job is planned once without a budget, which tells the unsliced need, then run by one Ray worker with
``--worker-memory`` = idle + share * need; idle is what the worker of a tiny job held before any work.
Printed: the budget, what was planned within it, what of the activations waited on disk, and the peak that the
worker measured (of itself, without Ray's shared memory). Weights are random, the text is random words.

- ``many-blocks``: a Llama of 400 blocks, hidden 512.
- ``wide-linear``: one block with a single quantized linear, 16384 x 16384 (an output projection; all else is
  kept by a rule).
- ``many-experts``: two blocks of 64 experts, hidden 2048. Its budget beside idle is a fifth of its unsliced
  statistics, which is less than 40 % of the need.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from memory import make_source

from quantlib.job.report import REPORT_NAME
from tests.support.tiny_jobs import tiny_source, tiny_text

QUANTMILL = str(Path(sys.executable).with_name("quantmill"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model and what is asked for it.

    Attributes:
        rules: Of the recipe.
        settings: Of config.json beside the sizes.
        statistics_share: What the budget beside idle may be at most of the unsliced statistics.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    sequences: int
    sequence_length: int
    rules: str = ""
    family: str = "llama"
    settings: Mapping[str, Any] = field(default_factory=dict)
    statistics_share: float | None = None


JOBS = {
    "many-blocks": Job(blocks=400, hidden=512, intermediate=256, heads=8, sequences=192, sequence_length=512),
    "wide-linear": Job(
        blocks=1,
        hidden=16384,
        intermediate=128,
        heads=128,
        sequences=256,
        sequence_length=256,
        rules='[[rules]]\nmatch = "*.o_proj"\n[[rules]]\nmatch = "*"\nkeep = true\n',
    ),
    "many-experts": Job(
        blocks=2,
        hidden=2048,
        intermediate=256,
        heads=16,
        sequences=32,
        sequence_length=256,
        family="qwen3_moe",
        settings={
            # The same by two names: the support for tiny models gives both.
            "num_experts": 64,
            "num_local_experts": 64,
            "num_experts_per_tok": 8,
            "mlp_only_layers": [],
            "moe_intermediate_size": 256,
            "head_dim": 128,
        },
        statistics_share=0.2,
    ),
}


def run(job: Job, idle: int, share: float, threads: int, folder: Path) -> str:
    """Plan and convert; gives a line of the table."""
    make_source(
        folder / "source",
        job.blocks,
        hidden=job.hidden,
        intermediate=job.intermediate,
        heads=job.heads,
        kv_heads=1,
        positions=job.sequence_length,
        family=job.family,
        **job.settings,
    )
    text = tiny_text(folder / "text.jsonl", documents=job.sequences * job.sequence_length // 20)
    (folder / "recipe.toml").write_text(job.rules)
    given = [str(folder / "source"), str(folder / "output"), "--recipe", str(folder / "recipe.toml")]
    given += ["--calibration", str(text), "--sequences", str(job.sequences), "--workers", "1"]
    given += ["--sequence-length", str(job.sequence_length), "--threads-per-worker", str(threads)]
    given += ["--checkpoint-every", "0"]
    planned_bytes = json.loads(_said("plan", *given, "--json"))["memory_bytes"]
    unsliced, statistics = planned_bytes["unsliced"], planned_bytes["worker"]["statistics"]
    allowed = share * unsliced
    if job.statistics_share is not None:
        allowed = min(allowed, job.statistics_share * statistics)
    budget = idle + int(allowed)
    _said("quantize", *given, "--worker-memory", str(budget))
    report = json.loads((folder / "output" / REPORT_NAME).read_text())
    memory: dict[str, Any] = report["memory"]
    within = sum(memory["planned"]["worker"].values())
    (peak,) = memory["worker_peak_memory_bytes"]
    (on_disk,) = memory["worker_waiting_on_disk_bytes"]
    figures = [idle, unsliced, statistics, budget, within, peak, on_disk]
    cells = [f"{size / 1e6:,.0f}" for size in figures]
    cells += [str(memory["most_slices"]), "yes" if peak <= budget else "**no**", f"{report['seconds']:,.0f}"]
    return " | ".join(cells)


def idle_bytes(folder: Path) -> int:
    """Of a worker before any work."""
    tiny_source(folder / "source", num_hidden_layers=1)
    given = ["--method", "rtn", "--group-size", "32", "--workers", "1", "--threads-per-worker", "1"]
    _said("quantize", str(folder / "source"), str(folder / "output"), *given)
    report = json.loads((folder / "output" / REPORT_NAME).read_text())
    return report["memory"]["planned"]["worker"]["idle"]


def _said(*command: str) -> str:
    with subprocess.Popen([QUANTMILL, *command], stdout=subprocess.PIPE, text=True) as running:
        try:
            said, _ = running.communicate()
        except BaseException:
            # Politely: it has workers and a server to stop.
            running.terminate()
            raise
    if running.returncode:
        sys.exit(running.returncode)
    return said


def main() -> None:
    """Run the jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    columns = ("job", "idle MB", "unsliced need", "its statistics", "budget", "planned", "peak", "on disk")
    columns += ("slices", "inside", "s")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in arguments.jobs:
        with tempfile.TemporaryDirectory(prefix="quantmill-budget-") as folder:
            idle = idle_bytes(Path(folder) / "tiny")
            line = run(JOBS[name], idle, arguments.share, arguments.threads, Path(folder))
            print(f"| {name} | {line} |", flush=True)


if __name__ == "__main__":
    main()
