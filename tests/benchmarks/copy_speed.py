"""How fast is a conversion without data beside the storage client alone? From S3 to S3 on one machine.

    python tests/benchmarks/copy_speed.py [--blocks 6] [--repeats 3] [--engines obstore s3fs] [--jobs rtn4]

A random Llama of wide blocks lies in an S3 server (SeaweedFS) on this machine, which shares its cores with
whoever reads and writes. For every engine and job, by turns: the client alone (the product's own `Store`, one
thread that reads all source tensors as the product asks for them, one that streams the very shards the job
makes), then the whole job in this process. Of the job the time from the first byte asked for to the last
shard recorded counts, as the report's timeline has it; planning, the lease and publishing are told apart.

``copy`` is what comes nearest to a conversion that does nothing: every linear is kept but one (an output
without a quantized linear is refused).
"""

import argparse
import gc
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from memory import make_source

from quantlib.checkpoint.index import open_checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.inprocess import quantize
from quantlib.job.options import options_from
from quantlib.storage import join_uri, open_store
from tests.support.s3_server import S3Server, running_s3_server

_ONE_LINEAR = "model.layers.0.self_attn.o_proj"
JOBS: dict[str, dict[str, Any]] = {
    "rtn4": {"scheme": "W4A16", "scale_search": "minmax"},
    "rtn8": {"scheme": "W8A16", "scale_search": "minmax"},
    "copy": {
        "scheme": "W8A16",
        "scale_search": "minmax",
        "rules": [{"match": _ONE_LINEAR}, {"match": "*", "keep": True}],
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What one measurement took.

    Attributes:
        seconds: Wall time that counts.
        whole_seconds: With start-up and publishing.
        client_cpu_seconds: Of this process.
        server_cpu_seconds: Of the S3 server.
        peak_bytes: Largest resident size of this process meanwhile, less what it held before.
    """

    seconds: float
    whole_seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float
    peak_bytes: int


@dataclass(slots=True)
class _Watch:
    """What `_watched` found; whoever counts a part of the time only says so in ``seconds``."""

    seconds: float | None = None
    taken: Taken | None = None


@contextmanager
def _watched(server: S3Server) -> Iterator[_Watch]:
    gc.collect()
    # The peak begins anew (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    held = _status_bytes("VmRSS")
    server_cpu, cpu, started, watch = (
        _cpu_seconds(server.pid),
        time.process_time(),
        time.monotonic(),
        _Watch(),
    )
    yield watch
    whole = time.monotonic() - started
    watch.taken = Taken(
        seconds=whole if watch.seconds is None else watch.seconds,
        whole_seconds=whole,
        client_cpu_seconds=time.process_time() - cpu,
        server_cpu_seconds=_cpu_seconds(server.pid) - server_cpu,
        peak_bytes=_status_bytes("VmHWM") - held,
    )


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _cpu_seconds(pid: int) -> float:
    values = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def convert(server: S3Server, engine: str, job: str, source: str, output: str) -> Taken:
    """The whole job in this process."""
    values = {"source": source, "output": output, "method": "rtn", "storage_engine": engine, "device": "cpu"}
    with _watched(server) as watch:
        report = quantize(options_from({**values, **JOBS[job]}))
        lanes = [lane for w in report["timeline"]["workers"] for lane in (w["compute"], w["storage"])]
        moves = [(start, end) for lane in lanes for stage, start, end in lane if stage in ("read", "write")]
        watch.seconds = max(end for _, end in moves) - min(start for start, _ in moves)
    assert watch.taken is not None
    return watch.taken


def move_alone(server: S3Server, engine: str, source: str, output: str, shards: Mapping[str, bytes]) -> Taken:
    """Read every source tensor and stream these shards, both at a time."""
    store = open_store(source, engine)
    checkpoint = open_checkpoint(store, source)
    by_shard: dict[str, list[str]] = {}
    for name, entry in checkpoint.tensors.items():
        by_shard.setdefault(entry.shard, []).append(name)

    def read_all() -> None:
        for names in by_shard.values():
            read_tensors(store, checkpoint, names)

    def write_all() -> None:
        for name, content in shards.items():
            with store.open_writer(join_uri(output, name)) as writer:
                writer.write(content)

    with _watched(server) as watch, ThreadPoolExecutor(2) as threads:
        for moving in [threads.submit(read_all), threads.submit(write_all)]:
            moving.result()
    assert watch.taken is not None
    return watch.taken


@contextmanager
def _own_bucket(server: S3Server, number: int) -> Iterator[str]:
    """A bucket for one output: removed with it, its bytes leave the server's disk at once."""
    bucket = f"output-{number}"
    server.client.create_bucket(Bucket=bucket)
    # The server makes room for a bucket when the first object comes.
    server.client.put_object(Bucket=bucket, Key="first", Body=b"first")
    try:
        yield f"s3://{bucket}/model"
    finally:
        keys = [i["Key"] for i in server.client.list_objects_v2(Bucket=bucket).get("Contents", [])]
        for key in keys:
            server.client.delete_object(Bucket=bucket, Key=key)
        server.client.delete_bucket(Bucket=bucket)


def _shards(store: Any, output: str) -> dict[str, bytes]:
    return {
        info.uri.rpartition("/")[2]: store.read(info.uri)
        for info in store.list(output)
        if info.uri.endswith(".safetensors")
    }


def _digest(shards: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(shards):
        digest.update(shards[name])
    return digest.hexdigest()


def measure(server: S3Server, source: str, arguments: argparse.Namespace) -> None:
    """Print a line a measurement as it comes, then the medians."""
    number, medians = 0, []
    source_bytes = sum(info.size_bytes for info in open_store(source, "obstore").list(source))
    print(_HEADING)
    for job in arguments.jobs:
        with _own_bucket(server, number) as output:
            convert(server, "obstore", job, source, output)
            shards = _shards(open_store(output, "obstore"), output)
        number += 1
        moved = source_bytes + sum(len(content) for content in shards.values())
        print(f"{job}: {moved / 1e6:,.0f} MB, sha256 of the shards {_digest(shards)}", flush=True)
        taken: dict[tuple[str, str], list[Taken]] = {}
        for _ in range(arguments.repeats):
            for engine in arguments.engines:
                for side in ("client", "job"):
                    number += 1
                    with _own_bucket(server, number) as output:
                        if side == "client":
                            found = move_alone(server, engine, source, output, shards)
                        else:
                            found = convert(server, engine, job, source, output)
                    taken.setdefault((engine, side), []).append(found)
                    print(_line(job, engine, side, moved, found), flush=True)
        medians += [_medians(job, engine, moved, taken) for engine in arguments.engines]
    print("\n".join(["", _MEDIANS, *medians]))


_HEADING = (
    "| job | engine | side | s | MB/s | CPU s | CPU s of the server | peak MB | start-up and publishing s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
_MEDIANS = (
    "| job | engine | client alone MB/s | job MB/s | ratio, of each repeat | CPU s of client and job |\n"
    "|---|---|---|---|---|---|"
)


def _line(job: str, engine: str, side: str, moved: int, taken: Taken) -> str:
    return (
        f"| {job} | {engine} | {side} | {taken.seconds:.2f} | {moved / taken.seconds / 1e6:,.0f} |"
        f" {taken.client_cpu_seconds:.1f} | {taken.server_cpu_seconds:.1f} | {taken.peak_bytes / 1e6:,.0f} |"
        f" {taken.whole_seconds - taken.seconds:.1f} |"
    )


def _medians(job: str, engine: str, moved: int, taken: Mapping[tuple[str, str], list[Taken]]) -> str:
    alone, whole = taken[engine, "client"], taken[engine, "job"]
    rates = [statistics.median(moved / t.seconds / 1e6 for t in side) for side in (alone, whole)]
    ratios = [a.seconds / w.seconds for a, w in zip(alone, whole, strict=True)]
    cpu = [statistics.median(t.client_cpu_seconds for t in side) for side in (alone, whole)]
    return (
        f"| {job} | {engine} | {rates[0]:,.0f} | {rates[1]:,.0f} | **{statistics.median(ratios):.2f}**"
        f" ({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {cpu[0]:.1f}, {cpu[1]:.1f} |"
    )


def main() -> int:
    """Make the model, serve it, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=("obstore", "s3fs"), default=("obstore", "s3fs"))
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantmill-copy-") as name:
        folder = Path(name)
        shape = {"hidden": arguments.hidden, "intermediate": arguments.intermediate, "heads": 32}
        make_source(folder / "source", arguments.blocks, **shape)
        with running_s3_server(folder / "s3") as server:
            os.environ.update(server.environment)
            measure(server, server.put_folder(folder / "source", "source"), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
