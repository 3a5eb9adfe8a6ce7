"""Source bytes counted where they leave the server: each tensor once, a tied embedding twice, headers extra.

Jobs run on a Ray of their own, so that its workers find the counting proxy in their environment.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantlib.checkpoint.header import FIRST_READ_BYTES
from tests.support.chaos import job_values
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.s3_server import S3Server
from tests.support.tiny_jobs import tiny_options, tiny_source

pytestmark = pytest.mark.slow

WORKERS = (1, 3)
TIED = {"untied": False, "tied": True}
EMBEDDING = "model.embed_tokens.weight"
# Blocks of 1.3 MB, some of them in two shards: tensors further apart than what is fetched along with them.
_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "max_shard_size": "2MB",
}
_TIME_LIMIT_S = 400
# Jobs as lists of options; those with the same number of workers share them.
_PROGRAM = """
import itertools, json, os, sys

os.environ["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] = "1"
import ray

from quantlib.inprocess import DirectStages
from quantlib.job.conversion import convert
from quantlib.job.options import options_from
from workers.api import open_crew

jobs = [options_from(values) for values in json.load(sys.stdin)]
# As many CPUs as the job with most workers needs, whatever this machine has.
ray.init(address="local", num_cpus=max(job.workers for job in jobs), include_dashboard=False)
for _, shared in itertools.groupby(jobs, lambda job: job.workers):
    shared = list(shared)
    with open_crew(shared[0]) as crew:
        for options in shared:
            (report,) = convert([options], crew, DirectStages(), lambda _: None)
            assert report["workers"] == options.workers
            assert report["evaluation"] is not None
"""


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server, tmp_path_factory) -> Iterator[FaultProxy]:
    """The proxy, after one job for every model and number of workers went through it."""
    root = tmp_path_factory.mktemp("bytes")
    tiny_options(root)
    for kind, is_tied in TIED.items():
        tiny_source(root / kind, tie_word_embeddings=is_tied, **_SHAPE)
    with fault_proxy(s3_server.endpoint) as running:
        _convert_all(s3_server, running, root)
        yield running


def _convert_all(server: S3Server, proxy: FaultProxy, root: Path) -> None:
    jobs = []
    for workers in WORKERS:
        for kind in TIED:
            # A copy for every job, so that what each reads is told apart.
            source = server.put_folder(root / kind, _source(kind, workers))
            output = server.uri(f"bytes/output-{kind}-{workers}")
            jobs.append(job_values(root, source, output, root, workers=workers, checkpoint_every=1))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_", "PREFECT_"))}
    environment = {
        **kept,
        **server.environment,
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps([{**job, "runner": "ray"} for job in jobs]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _source(kind: str, workers: int) -> str:
    return f"bytes/source-{kind}-{workers}"


def _tensors(content: bytes) -> dict[str, tuple[int, int]]:
    """Name -> first byte and one past the last, by the format's own words."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
    }


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", TIED)
def test_source_bytes_leave_the_server_once(s3_server: S3Server, proxy: FaultProxy, kind, workers):
    keys = [key for key in s3_server.keys(f"{_source(kind, workers)}/") if key.endswith(".safetensors")]
    assert len(keys) > 2
    found, expected = {}, {}
    for key in keys:
        content, place = s3_server.get(key), f"{s3_server.bucket}/{key}"
        # No tensor lies at byte 0: these are the headers, read by the plan and by every worker.
        headers = (0, min(FIRST_READ_BYTES, len(content)))
        spans = [(read.start, read.end) for read in proxy.reads if read.key == place]
        assert {span for span in spans if span[0] == 0} == {headers}
        extra = spans.count(headers)
        assert extra == 1 + workers, key
        for name, (start, end) in _tensors(content).items():
            along = extra if start < headers[1] else 0
            found[name] = proxy.times_read(place, max(start, headers[1]) if end > headers[1] else start, end)
            times = 2 if TIED[kind] and name == EMBEDDING else 1
            times += along if end <= headers[1] else 0
            expected[name] = (times, times)
    assert found == expected
    assert EMBEDDING in found
    assert ("lm_head.weight" in found) is not TIED[kind]
