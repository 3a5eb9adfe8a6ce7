"""What Prefect, Ray and object storage cost: CPU seconds of a job with all three beside the same job without.

    python tests/benchmarks/overhead.py [--rounds 1] [--sequences 64]

The demo's model and calibration text, one worker of one thread. ``inprocess`` is one process on local files;
``flow`` is a Prefect flow on a Ray of its own, from S3 to S3 (SeaweedFS on this machine, which was there
before and is not counted). CPU seconds are those of every process a command started, servers and daemons
included. Start-up is told apart: it is what the same command takes for a model of one tiny block. Sides take
turns; of every command the cheapest round counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.s3_server import running_s3_server
from tests.support.tiny_jobs import tiny_source

DEMO = Path(__file__).resolve().parents[2] / ".demo"
QUANTMILL = str(Path(sys.executable).with_name("quantmill"))


def cpu_seconds(source: str, output: str, side: str, sequences: int, text: Path) -> float:
    """Of one conversion."""
    command = [QUANTMILL, "quantize", source, output, "--calibration", str(text), "--group-size", "64"]
    command += ["--sequences", str(sequences), "--sequence-length", "512", "--checkpoint-every", "0"]
    command += ["--workers", "1", "--threads-per-worker", "1", "--device", "cpu"]
    command += ["--runner", "inprocess"] if side == "inprocess" else []
    # In a process of its own: it takes every descendant of its process for the command's, and ends it.
    measuring = [sys.executable, str(Path(__file__).with_name("cpu_seconds.py")), "--json", "--", *command]
    ended = subprocess.run(measuring, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        sys.exit(ended.returncode)
    return json.loads(ended.stdout.splitlines()[-1])["cpu_seconds"]


def main() -> None:
    """Measure both sides, and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--model", type=Path, default=DEMO / "source" / "SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, default=DEMO / "text" / "calibration.jsonl")
    arguments = parser.parse_args()
    least: dict[tuple[str, str], float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="quantmill-overhead-") as name,
        running_s3_server(Path(name) / "s3") as server,
    ):
        folder = Path(name)
        os.environ.update(server.environment)
        tiny_source(folder / "tiny", num_hidden_layers=1, intermediate_size=128, max_position_embeddings=512)
        places = {
            ("inprocess", "start-up"): str(folder / "tiny"),
            ("flow", "start-up"): server.put_folder(folder / "tiny", "tiny"),
            ("inprocess", "job"): str(arguments.model),
            ("flow", "job"): server.put_folder(arguments.model, "model"),
        }
        for number in range(arguments.rounds):
            for (side, part), source in places.items():
                root = str(folder) if side == "inprocess" else f"s3://{server.bucket}"
                rows = arguments.sequences if part == "job" else 1
                found = cpu_seconds(source, f"{root}/{part}-{number}", side, rows, arguments.calibration)
                least[side, part] = min(found, least.get((side, part), found))
                print(f"{side:10} {part:9} {found:7.1f} CPU s", flush=True)
    alone, flow = (least[side, "job"] - least[side, "start-up"] for side in ("inprocess", "flow"))
    print(f"without start-up: inprocess {alone:.1f}, flow {flow:.1f} CPU s, {flow / alone - 1:+.1%}")


if __name__ == "__main__":
    main()
