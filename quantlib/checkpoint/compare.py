"""Compares two checkpoints tensor by tensor, however each of them is cut into shards.

Names, dtypes, shapes, every byte, and what their ``config.json`` says of the quantization. Each difference is
one sentence. Left out: header layout, side files and everything else in ``config.json``, which may differ
between outputs that load as the same model.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlib.checkpoint.findings import limited
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.index import Checkpoint, list_folder, open_checkpoint, refuse_staged
from quantlib.checkpoint.source import holds_gguf
from quantlib.errors import CheckpointError
from quantlib.storage import Store

# Held twice for each checkpoint: one piece is compared while the next is fetched.
PIECE_BYTES = 64 << 20
_SHOWN_CHARACTERS = 100
_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareResult:
    """What a comparison found.

    Attributes:
        num_tensors: Tensors whose bytes were compared: same name, dtype and shape in both.
        num_bytes: Bytes of these tensors in one checkpoint, all of them read in both.
        findings: One sentence for each difference; empty when there is none.
    """

    num_tensors: int
    num_bytes: int
    findings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when nothing differs."""
        return not self.findings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Bytes [begin, end) of a tensor, counted from its first, and where both checkpoints hold it."""

    left: TensorEntry
    right: TensorEntry
    begin: int
    end: int


# Pieces, and their bytes in both checkpoints as they come in.
_Fetch = tuple[list[_Piece], Future[list[memoryview]], Future[list[memoryview]]]


def compare_checkpoints(store: Store, uri: str, other_store: Store, other_uri: str) -> CompareResult:
    """Compare two checkpoints; the order of the two changes only the wording.

    A checkpoint that is damaged so that it cannot be opened is a finding, and nothing is compared.

    Args:
        store: The store the first lies in.
        uri: Its folder.
        other_store: The store the second lies in.
        other_uri: Its folder.

    Raises:
        ObjectNotFoundError: There is nothing at one of the addresses.
        CheckpointError: An object was replaced meanwhile.

    Cost: reads every byte of both; about 320 MiB of memory.
    """
    findings: list[str] = []
    left = _opened(store, uri, findings)
    right = _opened(other_store, other_uri, findings)
    if left is None or right is None:
        return CompareResult(num_tensors=0, num_bytes=0, findings=tuple(findings))
    findings += _name_findings(left, right)
    findings += limited(_kind_findings(left, right))
    pairs = [(entry, right.tensors[name]) for name, entry in left.tensors.items() if name in right.tensors]
    same = [(entry, other) for entry, other in pairs if _kind(entry) == _kind(other)]
    differing = differing_bytes(store, left, other_store, right, same)
    findings += limited(
        f"Tensor {entry.name} differs in {differing[entry.name]:,} of its {entry.size_bytes:,} bytes."
        for entry, _ in same
        if entry.name in differing
    )
    findings += limited(_quantization_findings(left, right))
    return CompareResult(
        num_tensors=len(same),
        num_bytes=sum(entry.size_bytes for entry, _ in same),
        findings=tuple(findings),
    )


def _opened(store: Store, uri: str, findings: list[str]) -> Checkpoint | None:
    try:
        listing = list_folder(store, uri)
        refuse_staged(uri, listing)
        if not holds_gguf(listing):
            return open_checkpoint(store, uri)
        # The gguf package and the readers of transformers take a while to import.
        from quantlib.checkpoint.gguf_files.stored import open_parts

        return open_parts(store, uri, listing)
    except CheckpointError as error:
        findings.append(f"{uri} cannot be compared: {error}.")
        return None


def _name_findings(left: Checkpoint, right: Checkpoint) -> Iterator[str]:
    for one, other in ((left, right), (right, left)):
        yield from limited(
            f"Tensor {name} is in {one.uri} only." for name in one.tensors if name not in other.tensors
        )


def _kind_findings(left: Checkpoint, right: Checkpoint) -> Iterator[str]:
    for name, entry in left.tensors.items():
        other = right.tensors.get(name)
        if other is not None and _kind(entry) != _kind(other):
            yield (
                f"Tensor {name} is {entry.dtype} {list(entry.shape)} in {left.uri} and"
                f" {other.dtype} {list(other.shape)} in {right.uri}."
            )


def _kind(entry: TensorEntry) -> tuple[str, tuple[int, ...]]:
    return entry.dtype, entry.shape


def differing_bytes(
    store: Store,
    left: Checkpoint,
    other_store: Store,
    right: Checkpoint,
    pairs: Iterable[tuple[TensorEntry, TensorEntry]],
) -> dict[str, int]:
    """Tensor name -> how many of its bytes differ, of those where any does.

    Args:
        store: Where the first checkpoint lies.
        left: The first.
        other_store: Where the other lies.
        right: The other.
        pairs: Tensors of the first and the other, of equal size.

    Raises:
        CheckpointError: An object was replaced meanwhile.
    """
    differing: dict[str, int] = {}
    with ThreadPoolExecutor(2, thread_name_prefix="compare") as ahead:

        def fetch(batch: list[_Piece]) -> _Fetch:
            ours = [(piece.left, piece) for piece in batch]
            theirs = [(piece.right, piece) for piece in batch]
            return (
                batch,
                ahead.submit(_read, store, left, ours),
                ahead.submit(_read, other_store, right, theirs),
            )

        for batch, ours, theirs in _one_ahead(map(fetch, _batches(pairs))):
            for piece, one, other in zip(batch, ours.result(), theirs.result(), strict=True):
                count = np.count_nonzero(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8))
                if count:
                    differing[piece.left.name] = differing.get(piece.left.name, 0) + int(count)
    return differing


def _one_ahead(fetches: Iterator[_Fetch]) -> Iterator[_Fetch]:
    """The same, but the next is begun before one is given out."""
    current = next(fetches, None)
    while current is not None:
        coming = next(fetches, None)
        yield current
        current = coming


def _batches(pairs: Iterable[tuple[TensorEntry, TensorEntry]]) -> Iterator[list[_Piece]]:
    """Pieces of at most `PIECE_BYTES` together, in the order in which the first checkpoint stores them."""
    batch: list[_Piece] = []
    size_bytes = 0
    for left, right in sorted(pairs, key=lambda pair: (pair[0].shard, pair[0].start)):
        for begin in range(0, left.size_bytes, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, left.size_bytes)
            if batch and size_bytes + end - begin > PIECE_BYTES:
                yield batch
                batch, size_bytes = [], 0
            batch.append(_Piece(left=left, right=right, begin=begin, end=end))
            size_bytes += end - begin
    if batch:
        yield batch


def _read(
    store: Store, checkpoint: Checkpoint, parts: Sequence[tuple[TensorEntry, _Piece]]
) -> list[memoryview]:
    """The bytes of pieces, in order; one call to the store for each shard."""
    by_shard: dict[str, list[int]] = {}
    for position, (entry, _) in enumerate(parts):
        by_shard.setdefault(entry.shard, []).append(position)
    found: dict[int, memoryview] = {}
    for shard, positions in by_shard.items():
        ranges = [
            (entry.start + piece.begin, entry.start + piece.end)
            for entry, piece in (parts[position] for position in positions)
        ]
        views = store.read_ranges(checkpoint.shards[shard], ranges)
        found.update(zip(positions, views, strict=True))
    return [found[position] for position in range(len(parts))]


def _quantization_findings(left: Checkpoint, right: Checkpoint) -> Iterator[str]:
    blocks = [checkpoint.config.get("quantization_config", _ABSENT) for checkpoint in (left, right)]
    for path, one, other in _different_values("quantization_config", *blocks):
        yield (f"{path} of config.json is {_shown(one)} in {left.uri} and {_shown(other)} in {right.uri}.")


def _different_values(path: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from _different_values(f"{path}.{key}", one.get(key, _ABSENT), other.get(key, _ABSENT))
    elif one != other:
        yield path, one, other


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
