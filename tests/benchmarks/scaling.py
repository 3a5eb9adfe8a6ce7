"""What a second worker is worth: wall time of a job with one worker and with two, one thread each.

    python tests/benchmarks/scaling.py [--propagation original quantized] [--workers 1 2] [--rounds 1]

The demo's model and calibration text through Ray on this machine, without evaluation. Time runs from the
first block to the last shard: starting Ray and the workers is apart. Runs take turns, so that an hour's noise
meets both; what is printed is the least of the rounds and its ratio to the first number of workers.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from quantlib.inprocess import DirectStages
from quantlib.job.conversion import convert
from quantlib.job.options import options_from
from quantlib.job.stages import Progress
from workers.api import open_crew

DEMO = Path(__file__).resolve().parents[2] / ".demo"


def seconds_of_a_job(folder: Path, propagation: str, workers: int, arguments: argparse.Namespace) -> float:
    """Convert the model once."""
    options = options_from(
        {
            "source": str(arguments.model),
            "output": str(folder / "output"),
            "calibration": str(arguments.calibration),
            "group_size": 64,
            "sequences": arguments.sequences,
            "sequence_length": 512,
            "propagation": propagation,
            "workers": workers,
            "threads_per_worker": 1,
            "checkpoint_every": 0,
            "device": "cpu",
        }
    )
    marks: list[float] = []

    def on_progress(progress: Progress) -> None:
        if progress.label.startswith("block ") or progress.label == "publish":
            marks.append(time.monotonic())

    with open_crew(options) as crew:
        convert([options], crew, DirectStages(), on_progress)
    return marks[-1] - marks[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--propagation", nargs="+", default=["original", "quantized"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--model", type=Path, default=DEMO / "source" / "SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, default=DEMO / "text" / "calibration.jsonl")
    arguments = parser.parse_args()
    for propagation in arguments.propagation:
        taken: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
        for _ in range(arguments.rounds):
            for workers in arguments.workers:
                folder = Path(tempfile.mkdtemp(prefix="scaling"))
                taken[workers].append(seconds_of_a_job(folder, propagation, workers, arguments))
                shutil.rmtree(folder)
        first = min(taken[arguments.workers[0]])
        for workers, seconds in taken.items():
            least = min(seconds)
            all_rounds = ", ".join(f"{value:.1f}" for value in seconds)
            print(f"{propagation:10} {workers} workers {least:7.1f} s {least / first:6.2f} x ({all_rounds})")


if __name__ == "__main__":
    main()
