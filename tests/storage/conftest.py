"""One store of every engine over an empty folder of its own, directly or through a proxy with faults."""

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from quantlib.storage import Store, obstore_engine, open_store, s3_settings, s3fs_writer
from tests.support.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.support.s3_server import S3Server

WRITERS = {"obstore": obstore_engine, "s3fs": s3fs_writer}
# The least that S3 takes as a part which is not the last.
PART_BYTES = 5 << 20


@dataclass(frozen=True)
class Place:
    """A store and the address of an empty folder in it."""

    store: Store
    root: str
    engine: str


@pytest.fixture(
    params=[
        "local",
        pytest.param("obstore", marks=pytest.mark.slow),
        pytest.param("s3fs", marks=pytest.mark.slow),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path) -> Place:
    if request.param == "local":
        return Place(store=open_store(f"file://{tmp_path}"), root=f"file://{tmp_path}/root", engine="local")
    server = request.getfixturevalue("s3_environment")
    root = server.uri(f"contract/{uuid.uuid4().hex}")
    return Place(store=open_store(root, request.param), root=root, engine=request.param)


@dataclass(frozen=True)
class SpoiledPlace:
    """A store that talks to the server through the proxy, and a folder of its own there."""

    store: Store
    proxy: FaultProxy
    server: S3Server
    folder: str
    engine: str

    def uri(self, name: str) -> str:
        return self.server.uri(f"{self.folder}/{name}")

    def put(self, name: str, content: bytes) -> str:
        """Store past the proxy."""
        return self.server.put(f"{self.folder}/{name}", content)

    def stored(self, name: str) -> bytes:
        return self.server.get(f"{self.folder}/{name}")

    def spoil(self, method: str, *faults: Fault | None) -> None:
        """The next requests of a method for this folder meet these faults, one each; all others none."""
        left = list(faults)
        lock = threading.Lock()

        def rule(request, draw):
            if request.method != method or self.folder not in f"{request.path}?{request.query}":
                return None
            with lock:
                return left.pop(0) if left else None

        self.proxy.rule = rule

    def spoil_all(self, fault: Fault) -> None:
        self.proxy.rule = lambda request, draw: fault


@pytest.fixture(params=sorted(WRITERS))
def setting(request, s3_environment, monkeypatch) -> Iterator[SpoiledPlace]:
    """A spoiled place with small parts and retries that come quickly."""
    monkeypatch.setattr(s3_settings, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(s3_settings, "MAX_BACKOFF_S", 0.2)
    monkeypatch.setattr(WRITERS[request.param], "PART_BYTES", PART_BYTES)
    with fault_proxy(s3_environment.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        folder = f"faults-{uuid.uuid4().hex}"
        store = open_store(s3_environment.uri(folder), request.param)
        store.list(s3_environment.uri(folder))
        yield SpoiledPlace(
            store=store, proxy=proxy, server=s3_environment, folder=folder, engine=request.param
        )
