"""A SeaweedFS server for the demo: started on free ports of the loopback, filled once, read from at the end.

``serve`` becomes the server (the caller stops it by its process id); ``upload`` waits for it and puts files
into its bucket unless they are there; ``download`` fetches one object, ``remove`` deletes a folder. Address
and freshly made credentials are left in ``<folder>/environment``, as lines a shell can source.
"""

import argparse
import json
import os
import secrets
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

BUCKET = "quantmill-demo"
START_TIMEOUT_S = 90.0
_PORTS: tuple[str, ...] = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


def main() -> None:
    """Run the command named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("serve", "upload"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path, help="folder of the server's data and its environment file")
    commands.choices["upload"].add_argument("paths", type=Path, nargs="+", help="files, or folders of them")
    command = commands.add_parser("download")
    command.add_argument("key", help="key in the demo's bucket")
    command.add_argument("target", type=Path, help="file to write")
    commands.add_parser("remove").add_argument("prefix", help="prefix of keys in the demo's bucket")
    arguments = vars(parser.parse_args())
    actions = {"serve": serve, "upload": upload, "download": download, "remove": remove}
    actions[arguments.pop("command")](**arguments)


def serve(folder: Path) -> None:
    """Choose ports and credentials, write the environment file, and become the server. Does not return."""
    folder = folder.resolve()
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    access_key, secret_key = "quantmill-demo", secrets.token_hex(16)
    identity = {
        "name": "demo",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    _write_privately(folder / "identities.json", json.dumps({"identities": [identity]}))
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    lines = (f"export {name}={value}\n" for name, value in environment.items())
    _write_privately(folder / "environment", "".join(lines))
    weed = Path(sys.executable).with_name("weed")
    os.chdir(folder)
    os.execv(weed, _command(weed, folder, data, ports))


def _command(weed: Path, folder: Path, data: Path, ports: dict[str, int]) -> list[str]:
    return [
        str(weed),
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.config={folder / 'identities.json'}",
        f"-bucket={BUCKET}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        *(f"-{option}={port}" for option, port in ports.items()),
    ]


def upload(folder: Path, paths: list[Path]) -> None:
    """Put files under their path relative to ``folder``'s parent, unless an object of that size is there."""
    store = _store()
    there = _objects_once_up(store)
    base = folder.resolve().parent
    for file in sorted(file for path in paths for file in _files(path.resolve())):
        key = file.relative_to(base).as_posix()
        if there.get(key) != file.stat().st_size:
            print(f"uploading {key}", flush=True)
            obstore.put(store, key, file)


def download(key: str, target: Path) -> None:
    """Write one object of the bucket to a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(bytes(obstore.get(_store(), key).bytes()))


def remove(prefix: str) -> None:
    """Delete every object whose key begins with the prefix (a whole folder name, ending in a slash)."""
    store = _store()
    paths = [item["path"] for page in obstore.list(store, prefix) for item in page]
    if paths:
        obstore.delete(store, paths)


def _store() -> S3Store:
    return S3Store(
        BUCKET,
        client_options={"allow_http": True, "timeout": "120s"},
        # Few: while the server starts, the caller asks again.
        retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
    )


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]


def _objects_once_up(store: S3Store) -> dict[str, int]:
    """Return key -> size in bytes of everything in the bucket, as soon as server and bucket are there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return {item["path"]: item["size"] for page in obstore.list(store) for item in page}
        except (obstore.exceptions.BaseError, OSError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"the S3 server did not answer within {START_TIMEOUT_S:g} s ({error}); see its log")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    # Held open together, so that no port is chosen twice.
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _write_privately(path: Path, text: str) -> None:
    # Renamed when complete: the shell that waits for this file must not read half of it.
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(text)
    partial.rename(path)


if __name__ == "__main__":
    main()
