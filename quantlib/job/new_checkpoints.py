"""Finds checkpoints below a prefix, and tells whether one is whole, from names, sizes and headers alone.

Whoever uploads a checkpoint gives no sign when it is done. So one counts as whole when its config.json can be
read, its index (if any) names shards that are all there, and every shard is as long as its own header says;
and as settled when none of its files came a short while ago. Left out: GGUF files, and folders inside a
checkpoint's folder.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from quantlib.checkpoint.index import (
    CONFIG_NAME,
    INDEX_NAME,
    find_side_files,
    open_checkpoint,
    read_config,
    read_weight_map,
    shard_files,
)
from quantlib.checkpoint.stated_quantization import config_digest, quantization_of, without_quantization
from quantlib.errors import CheckpointError, StorageError, TransientStorageError
from quantlib.job.provenance import PROVENANCE_NAME
from quantlib.storage import ObjectInfo, Store, uri_name


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFolder:
    """A folder that looks like a checkpoint, whole or not.

    Attributes:
        name: Its path below the prefix.
        uri: Its address.
        listing: File name -> object, of what lies directly in it.
    """

    name: str
    uri: str
    listing: Mapping[str, ObjectInfo]

    @property
    def fingerprint(self) -> str:
        """sha256 of names, sizes and etags of all its files: another one as soon as any of them changes."""
        rows = [(name, info.size_bytes, info.etag) for name, info in sorted(self.listing.items())]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def changed_s(self) -> float:
        """When the newest of its files came, in seconds since the epoch by the store's clock."""
        return max(info.modified_s or 0.0 for info in self.listing.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFiles:
    """What tells a source from another one, as a plan and a provenance record it.

    Attributes:
        uri: Address of the folder.
        objects: Name -> (size in bytes, etag) of shards and side files.
        config_digest: sha256 of ``config.json``.
    """

    uri: str
    objects: Mapping[str, tuple[int, str]]
    config_digest: str


def checkpoint_folders(
    store: Store, prefix: str, *, depth: int, excluded: Collection[str] = ()
) -> list[CheckpointFolder]:
    """Folders below a prefix that hold a config.json or safetensors weights, sorted by name.

    What an earlier conversion made, which its provenance tells, is none of them.

    Args:
        store: The store the prefix lies in.
        prefix: Normalized address.
        depth: How many folders deep to look; 1 takes those directly below the prefix.
        excluded: Addresses below the prefix at which nothing is looked for.

    Cost: one listing of everything below the prefix.
    """
    root = f"{prefix.rstrip('/')}/"
    listings: dict[str, dict[str, ObjectInfo]] = {}
    for info in store.list(prefix):
        if not any(info.uri.startswith(f"{place}/") for place in excluded):
            folder = info.uri.removeprefix(root).rpartition("/")[0]
            listings.setdefault(folder, {})[uri_name(info.uri)] = info
    taken: set[str] = set()
    found = []
    for name, listing in sorted(listings.items()):
        parents = list(_parents(name))
        if not name or len(parents) >= depth or taken.intersection(parents) or not _is_candidate(listing):
            continue
        taken.add(name)
        if PROVENANCE_NAME not in listing:
            found.append(CheckpointFolder(name=name, uri=root + name, listing=listing))
    return found


def _parents(name: str) -> Iterator[str]:
    """The folders that a folder is in, below the prefix.

    >>> list(_parents("a/b/c"))
    ['a', 'a/b']
    """
    parts = name.split("/")
    return ("/".join(parts[:length]) for length in range(1, len(parts)))


def _is_candidate(listing: Collection[str]) -> bool:
    known = CONFIG_NAME in listing or INDEX_NAME in listing
    return known or any(name.endswith(".safetensors") for name in listing)


def source_files(store: Store, folder: CheckpointFolder) -> SourceFiles:
    """What a plan would record of a checkpoint.

    Raises:
        CheckpointError: Its config.json or index is missing or damaged, or a shard is missing.
        StorageError: An object is gone by now, or may not be read.

    Cost: reads config.json and the index.
    """
    config = read_config(store, folder.uri, folder.listing)
    weight_map = read_weight_map(store, folder.uri, folder.listing)
    shards = shard_files(folder.uri, folder.listing, weight_map)
    quantization = quantization_of(config)
    meant = without_quantization(config) if quantization else config
    return SourceFiles(
        uri=folder.uri,
        objects={
            name: (folder.listing[name].size_bytes, folder.listing[name].etag)
            for name in sorted({*shards, *find_side_files(folder.listing)})
        },
        config_digest=config_digest(meant, quantization),
    )


def fault_of(store: Store, folder: CheckpointFolder) -> str | None:
    """Why a checkpoint is not whole, or cannot be read; None of one that is.

    Raises:
        TransientStorageError: The store does not answer.

    Cost: reads config.json, the index and the headers of all shards.
    """
    try:
        open_checkpoint(store, folder.uri)
    except TransientStorageError:
        raise
    except (CheckpointError, StorageError) as error:
        return error.message
    return None


def settles_in_s(folder: CheckpointFolder, *, settle_s: float, now_s: float) -> float:
    """Seconds until a checkpoint that does not change any more is settled; 0 of one that is.

    Args:
        settle_s: How long nothing may have changed.
        now_s: Seconds since the epoch.
    """
    return max(0.0, folder.changed_s + settle_s - now_s)
