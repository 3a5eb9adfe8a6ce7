"""Quantmill beside GPTQModel and llm-compressor: what a conversion costs and how good the result is.

    python tests/benchmarks/peers.py --output peers.md [--model FOLDER] [--sides NAME ...]

One after the other, each tool converts the same checkpoint to the same kind of grid on the same rows of token
ids with the same number of threads, peers in environments of their own (`peer_environments`) and in the dtype
that is faster on this processor. CPU seconds are those of all processes a tool starts, from its start to its
end (`cpu_seconds`). What it wrote is then decoded by one slow decoder that shares no code with the product
(`checkpoint_levels`) and evaluated as a plain transformers model in fp32 (`dense_evaluation`). Rows are kept
in a ``.jsonl`` beside the table; started again, only missing ones are made. A tool that cannot be installed,
or fails, has a row that says so, and the exit status is then 1.

Left out: evaluation and text processing inside the measured processes, except that Quantmill reads and
tokenizes its text itself; checkpoints with linears of different bits.

B sequences, T positions.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_levels import model_of_levels
from dense_evaluation import evaluate
from peer_environments import PEERS, make_environment
from peer_rows import QUANTMILL, SOURCE, PeerRows
from smollm2 import flops_per_cpu_second

from quantlib.calibration.corpus import load_tokenizer, rows_digest, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.checkpoint.index import open_checkpoint
from quantlib.errors import QuantError
from quantlib.storage import normalize_uri, open_store

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / ".demo"
SIDES = (QUANTMILL, *PEERS)
SETTING = ("bits", "group_size", "sequences", "sequence_length", "evaluation_sequences", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One model and the token rows that all sides get."""

    arguments: argparse.Namespace
    calibration_BT: torch.Tensor
    evaluation_BT: torch.Tensor

    @classmethod
    def open(cls, arguments: argparse.Namespace) -> "Bench":
        """Tokenize both texts with the model's tokenizer."""
        uri = normalize_uri(str(arguments.model))
        store = open_store(uri)
        tokenizer = load_tokenizer(store, open_checkpoint(store, uri))

        def rows(text: Path, count: int) -> torch.Tensor:
            documents, length = read_documents(str(text)), arguments.sequence_length
            return token_rows(documents, tokenizer, num_sequences=count, sequence_length=length, seed=0)

        return cls(
            arguments=arguments,
            calibration_BT=rows(arguments.calibration, arguments.sequences),
            evaluation_BT=rows(arguments.evaluation, arguments.evaluation_sequences),
        )

    @property
    def model_name(self) -> str:
        """The model's folder, from the repository if it is in there."""
        folder = self.arguments.model.resolve()
        return str(folder.relative_to(REPOSITORY) if folder.is_relative_to(REPOSITORY) else folder)

    def key(self, side: str) -> dict[str, Any]:
        """What decides a row."""
        shards = {path.name: path.stat().st_size for path in _shards(self.arguments.model)}
        named = [shards, rows_digest(self.calibration_BT), rows_digest(self.evaluation_BT)]
        setting = {"model": self.model_name} | {name: getattr(self.arguments, name) for name in SETTING}
        return {
            "side": side,
            "version": PEERS[side].version if side in PEERS else version("quantmill"),
            "setting": setting,
            "inputs": hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12],
        } | ({"dtype": self.arguments.peer_dtype} if side in PEERS else {})

    def run_folder(self, side: str) -> Path:
        """An empty folder for what a side writes; what an earlier run left there is removed."""
        name = hashlib.sha256(json.dumps(self.key(side)).encode()).hexdigest()[:12]
        folder = self.arguments.runs.absolute() / f"{side}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def run_side(bench: Bench, side: str) -> dict[str, Any]:
    """Convert the model with one tool.

    Returns:
        ``checkpoint`` (its folder), ``cost`` of the whole command, ``cpu_seconds`` by phase, ``size_bytes``
        of the shards written, and ``label`` for the table.

    Raises:
        QuantError: It cannot be installed, or ended in an error; the text is for the table.
    """
    folder = bench.run_folder(side)
    if side == QUANTMILL:
        cost = _measured(_quantmill_command(bench, folder), folder, bench.arguments.threads)
        spent = _quantmill_cpu_seconds(bench, folder, cost)
    else:
        cost = _measured(_peer_command(bench, side, folder), folder, bench.arguments.threads, side)
        spent = json.loads((folder / "report.json").read_text())
    checkpoint = folder / "checkpoint"
    size_bytes = sum(path.stat().st_size for path in _shards(checkpoint))
    return {
        "label": label_of(side, bench.arguments.peer_dtype),
        "checkpoint": str(checkpoint),
        "cost": cost,
        "cpu_seconds": spent,
        "size_bytes": size_bytes,
    }


def _with_rate(bench: Bench, side: str) -> dict[str, Any]:
    """`run_side`, and ``gflop_per_cpu_second``: what one was worth, mean of right before and after."""
    before = flops_per_cpu_second()
    found = run_side(bench, side)
    rate = (before + flops_per_cpu_second()) / 2
    torch.set_num_threads(bench.arguments.threads)
    return found | {"gflop_per_cpu_second": rate / 1e9}


def label_of(side: str, dtype: str) -> str:
    """A side's name in the table; ``dtype`` is that of a peer's model."""
    if side == QUANTMILL:
        return f"Quantmill {version('quantmill')}"
    return f"{side} {PEERS[side].version}, {PEERS[side].method}, in {dtype}"


def faster_dtype() -> str:
    """bfloat16 where the processor multiplies it faster, else float32 (AVX2 alone: 8 times faster)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x_NC, weight_RC = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        torch.nn.functional.linear(x_NC, weight_RC)
        started = time.process_time()
        for _ in range(20):
            torch.nn.functional.linear(x_NC, weight_RC)
        seconds[str(dtype).removeprefix("torch.")] = time.process_time() - started
    return min(seconds, key=seconds.__getitem__)


def _quantmill_command(bench: Bench, folder: Path) -> list[str]:
    """The product's own command line, in one process; without held-out text it does not evaluate."""
    arguments = bench.arguments
    command = [sys.executable, "-m", "quantlib", "quantize", str(arguments.model.absolute())]
    command += [str(folder / "checkpoint"), "--runner", "inprocess", "--device", "cpu"]
    command += ["--scheme", f"W{arguments.bits}A16", "--group-size", str(arguments.group_size)]
    command += ["--calibration", str(arguments.calibration.absolute()), "--seed", "0"]
    command += ["--sequences", str(arguments.sequences), "--sequence-length", str(arguments.sequence_length)]
    return [*command, "--threads-per-worker", str(arguments.threads)]


def _quantmill_cpu_seconds(bench: Bench, folder: Path, cost: Mapping[str, Any]) -> dict[str, float]:
    """CPU seconds by phase; saving is a part of its stages, imports are what is outside of them."""
    report = json.loads((folder / "checkpoint" / "quantmill_report.json").read_text())
    wanted, found = rows_digest(bench.calibration_BT), report["calibration"]["digest"]
    if found != wanted:
        raise QuantError(f"calibrated on other tokens: wanted {wanted[:12]}, found {found[:12]}")
    quantize = sum(stage["cpu_seconds"] for stage in report["stages"].values())
    return {"set_up": cost["cpu_seconds"] - quantize, "quantize": quantize, "save": 0.0}


def _peer_command(bench: Bench, side: str, folder: Path) -> list[str]:
    arguments, peer = bench.arguments, PEERS[side]
    environment = make_environment(side, peer.requirements, arguments.environments)
    if environment.failure is not None:
        raise QuantError(environment.failure)
    rows = folder / "rows.safetensors"
    save_file({"input_ids": bench.calibration_BT}, rows)
    command = [str(environment.python), str(peer.driver), str(arguments.model.absolute())]
    command += [str(folder / "checkpoint"), "--rows", str(rows), "--report", str(folder / "report.json")]
    command += ["--bits", str(arguments.bits), "--group-size", str(arguments.group_size)]
    return [*command, "--threads", str(arguments.threads), "--dtype", arguments.peer_dtype]


def _measured(command: Sequence[str], folder: Path, threads: int, side: str | None = None) -> dict[str, Any]:
    """Run a command below `cpu_seconds` in a folder of its own; its words go to ``log.txt`` there.

    Raises:
        QuantError: It ended with another status than 0.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if side is not None:
        least = PEERS[side].fewest_workers
        variables |= {name: str(max(threads, workers)) for name, workers in least.items()}
    log = folder / "log.txt"
    tool = [sys.executable, str(Path(__file__).with_name("cpu_seconds.py")), "--json", "--"]
    # The shell makes way for the command; without it the cost would have to be found among the tool's words.
    quiet = ["/bin/sh", "-c", 'exec "$@" >"$0" 2>&1', str(log)]
    done = subprocess.run(
        [*tool, *quiet, *command], cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise QuantError(f"failed with status {done.returncode}: {_last_line(log)} ({log})")
    return json.loads(done.stdout)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _losses(bench: Bench, checkpoint: Path) -> dict[str, Any]:
    loss = evaluate(model_of_levels(bench.arguments.model, checkpoint), bench.evaluation_BT)
    return {"perplexity": loss.perplexity, "row_losses": loss.row_losses}


def _compared(losses: Sequence[float], source_losses: Sequence[float]) -> dict[str, float]:
    """Ratio of perplexities, and its error over the rows, each compared with the source on the same row."""
    differences = [mine - its for mine, its in zip(losses, source_losses, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    deviation = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return {"ratio": ratio, "ratio_standard_error": ratio * deviation / math.sqrt(len(differences))}


def measure(bench: Bench, rows: PeerRows) -> int:
    """Make all missing rows; gives how many could not be made."""
    source = rows.find(bench.key(SOURCE))
    if source is None:
        size_bytes = sum(path.stat().st_size for path in _shards(bench.arguments.model))
        source = {"key": bench.key(SOURCE), "label": "source", "size_bytes": size_bytes}
        source |= _losses(bench, bench.arguments.model)
        rows.add(source)
    failures = 0
    for side in bench.arguments.sides:
        if rows.find(bench.key(side)) is not None:
            print(f"{side}: there already", flush=True)
            continue
        print(f"{side}: {bench.model_name}", flush=True)
        try:
            found = _with_rate(bench, side)
            found |= _losses(bench, Path(found["checkpoint"]))
        except QuantError as error:
            print(f"{side}: {error}", flush=True)
            label = label_of(side, bench.arguments.peer_dtype)
            rows.add_failed({"key": bench.key(side), "label": label, "failure": str(error)})
            failures += 1
            continue
        rows.add({"key": bench.key(side), **found, **_compared(found["row_losses"], source["row_losses"])})
    return failures


def parsed_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO / "source" / "SmolLM2-135M-Instruct")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="and their order")
    parser.add_argument("--environments", type=Path, default=DEMO / "peers", help="where peers are installed")
    parser.add_argument("--runs", type=Path, default=DEMO / "peers" / "runs", help="outputs and logs")
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), help="the faster one unless named")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64, help="of calibration")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--evaluation-sequences", type=int, default=32)
    parser.add_argument("--calibration", type=Path, default=DEMO / "text" / "calibration.jsonl")
    parser.add_argument("--evaluation", type=Path, default=DEMO / "text" / "evaluation.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, required=True, help="the table; its rows go to *.jsonl beside it"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the table."""
    arguments = parsed_arguments(given)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    arguments.peer_dtype = arguments.peer_dtype or faster_dtype()
    rows = PeerRows(arguments.output.with_suffix(".md"))
    failures = measure(Bench.open(arguments), rows)
    rows.write_table()
    print(arguments.output.with_suffix(".md").read_text())
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
