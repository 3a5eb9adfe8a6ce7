"""Re-reads a checkpoint from storage and says in sentences what is wrong with it.

Nothing is taken on trust from the run that wrote it: headers, digests, index and scales come from the stored
bytes. A fault does not end the verification; each is one finding. Left out: whether the numbers are good,
which is what evaluation is for.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from quantlib.checkpoint.findings import limited
from quantlib.checkpoint.header import Header, read_header
from quantlib.checkpoint.index import (
    INDEX_NAME,
    Checkpoint,
    list_folder,
    read_config,
    read_json,
    read_weight_map,
    refuse_staged,
)
from quantlib.checkpoint.reader import tensor_of
from quantlib.checkpoint.source import GGUF_ENDING, holds_gguf, open_source
from quantlib.checkpoint.source_check import check_source
from quantlib.errors import CheckpointError
from quantlib.job.accounts import Account
from quantlib.job.stages import Progress
from quantlib.storage import ObjectInfo, Store

REPORT_NAME = "quantmill_report.json"
# Held twice: one piece is hashed while the next is fetched.
PIECE_BYTES = 128 << 20
_Header = TypeVar("_Header")
_SCALE_ENDINGS = (".weight_scale", ".scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What a verification found.

    Attributes:
        num_shards: Shards looked at.
        num_tensors: Tensors in them.
        num_bytes: Bytes of the shards, all of them read.
        findings: One sentence for each fault; empty when all is well.
        accounts: What became of the tensors of the source; empty without one.
    """

    num_shards: int
    num_tensors: int
    num_bytes: int
    findings: tuple[str, ...]
    accounts: tuple[Account, ...] = ()

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.findings


def verify_checkpoint(
    store: Store,
    uri: str,
    source_uri: str | None = None,
    source_store: Store | None = None,
    *,
    report: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> VerifyResult:
    """Verify every shard, the index and the scales of a checkpoint, and what became of its source's tensors.

    Args:
        store: The store the checkpoint lies in.
        uri: Its folder.
        source_uri: The checkpoint it was made from; without it the comparison is left out.
        source_store: The store of the source, where it is another one.
        report: The run's report, where it is not stored beside the shards yet.
        on_progress: Called before every shard.

    Raises:
        ObjectNotFoundError: There is nothing at ``uri``.
        CheckpointError: The output is staged, the source cannot be opened, or an object was replaced
            meanwhile.

    Cost: reads every byte of the shards, and the scales twice; about 256 MiB of memory. With a source what
        was copied is read once more on both sides, with 320 MiB.
    """
    listing = list_folder(store, uri)
    refuse_staged(uri, listing)
    findings: list[str] = []
    report = report if report is not None else _stored_report(store, listing, findings)
    config = _config(store, uri, listing, findings)
    read = _read_gguf if holds_gguf(listing) else _read_safetensors
    contents = read(store, uri, listing, config, findings)
    findings += _digest_findings(store, contents.output.shards, report, on_progress)
    findings += contents.further_findings
    accounts: tuple[Account, ...] = ()
    if source_uri is not None:
        source = contents.source_of(open_source(source_store or store, source_uri))
        checked = check_source(store, contents.output, source_store or store, source, report)
        findings += checked.findings
        accounts = checked.accounts
    return VerifyResult(
        num_shards=len(contents.output.shards),
        num_tensors=len(contents.output.tensors),
        num_bytes=sum(info.size_bytes for info in contents.output.shards.values()),
        findings=tuple(findings),
        accounts=accounts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What can be read of an output.

    Attributes:
        output: Without the tensors of shards that are damaged or missing.
        further_findings: About index or parts, and scales; read when they are asked for.
        source_of: A source as the output holds what is copied of it.
    """

    output: Checkpoint
    further_findings: Iterator[str]
    source_of: Callable[[Checkpoint], Checkpoint]


def _read_safetensors(
    store: Store,
    uri: str,
    listing: Mapping[str, ObjectInfo],
    config: dict[str, Any],
    findings: list[str],
) -> _Contents:
    weight_map = _weight_map(store, uri, listing, findings)
    shards = {name: info for name, info in listing.items() if name.endswith(".safetensors")}
    headers = dict(_intact_headers(store, shards, findings, read_header))
    tensors = {name: entry for header in headers.values() for name, entry in header.tensors.items()}

    def further() -> Iterator[str]:
        if weight_map is not None:
            yield from _index_findings(store, listing, weight_map, headers)
        for shard, header in headers.items():
            yield from _scale_findings(store, shards[shard], header)

    return _Contents(
        output=Checkpoint(
            uri=uri, config=config, shards=shards, tensors=tensors, stored=tensors, side_files={}
        ),
        further_findings=further(),
        source_of=lambda source: source,
    )


def _read_gguf(
    store: Store,
    uri: str,
    listing: Mapping[str, ObjectInfo],
    config: dict[str, Any],
    findings: list[str],
) -> _Contents:
    # The gguf package and the readers of transformers take a while to import.
    from quantlib.checkpoint.gguf_files import stored
    from quantlib.checkpoint.gguf_files.header import read_gguf_header

    shards = {name: info for name, info in listing.items() if name.endswith(GGUF_ENDING)}
    headers = dict(_intact_headers(store, shards, findings, read_gguf_header))

    def further() -> Iterator[str]:
        yield from stored.part_findings(headers)
        for shard, header in headers.items():
            yield from stored.scale_findings(store, shards[shard], header)

    return _Contents(
        output=stored.open_output(uri, config, shards, headers),
        further_findings=further(),
        source_of=stored.with_wide_vectors,
    )


def _stored_report(store: Store, listing: Mapping[str, ObjectInfo], findings: list[str]) -> Mapping[str, Any]:
    if REPORT_NAME not in listing:
        findings.append(f"There is no {REPORT_NAME}, so that the shards' digests cannot be compared.")
        return {}
    try:
        return read_json(store, listing[REPORT_NAME])
    except CheckpointError as error:
        findings.append(_sentence(error))
        return {}


def _config(store: Store, uri: str, listing: Mapping[str, ObjectInfo], findings: list[str]) -> dict[str, Any]:
    """config.json, empty if it cannot be read, after noting what is wrong with it."""
    try:
        return read_config(store, uri, listing)
    except CheckpointError as error:
        findings.append(_sentence(error))
        return {}


def _weight_map(
    store: Store, uri: str, listing: Mapping[str, ObjectInfo], findings: list[str]
) -> dict[str, str] | None:
    """The index, after noting what is wrong with it."""
    try:
        weight_map = read_weight_map(store, uri, listing)
    except CheckpointError as error:
        findings.append(_sentence(error))
        return None
    if weight_map is None and "model.safetensors" not in listing:
        findings.append(f"There is neither {INDEX_NAME} nor model.safetensors.")
    return weight_map


def _intact_headers(
    store: Store,
    shards: Mapping[str, ObjectInfo],
    findings: list[str],
    read: Callable[[Store, ObjectInfo], _Header],
) -> Iterator[tuple[str, _Header]]:
    for shard, info in sorted(shards.items()):
        try:
            yield shard, read(store, info)
        except CheckpointError as error:
            findings.append(_sentence(error))


def _digest_findings(
    store: Store,
    shards: Mapping[str, ObjectInfo],
    report: Mapping[str, Any],
    on_progress: Callable[[Progress], None],
) -> Iterator[str]:
    promised = _promised_digests(report)
    for name in sorted(promised.keys() - shards.keys()):
        yield f"{name} is in the report, but not there."
    for number, (name, info) in enumerate(sorted(shards.items())):
        on_progress(Progress(done=number, total=len(shards), label=name))
        found = object_sha256(store, info)
        if name not in promised:
            if report:
                yield f"{name} is there, but the report does not name it."
        elif promised[name] != found:
            yield f"{name} has the sha256 {found}, the report says {promised[name]}."


def _promised_digests(report: Mapping[str, Any]) -> dict[str, Any]:
    """Shard name -> sha256, of those entries of a report that can be understood."""
    entries = report.get("shards")
    return {
        entry["name"]: entry.get("sha256")
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }


def object_sha256(store: Store, info: ObjectInfo) -> str:
    """sha256 (hex) of a whole object, read in pieces of `PIECE_BYTES`, one ahead of the hashing.

    Raises:
        CheckpointError: The object was replaced meanwhile.
    """
    digest = hashlib.sha256()
    pieces = [
        (start, min(start + PIECE_BYTES, info.size_bytes)) for start in range(0, info.size_bytes, PIECE_BYTES)
    ]
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as ahead:
        coming = None
        for piece in pieces:
            current, coming = coming, ahead.submit(store.read_ranges, info, [piece])
            if current is not None:
                digest.update(current.result()[0])
        if coming is not None:
            digest.update(coming.result()[0])
    return digest.hexdigest()


def _index_findings(
    store: Store,
    listing: Mapping[str, ObjectInfo],
    weight_map: Mapping[str, str],
    headers: Mapping[str, Header],
) -> Iterator[str]:
    named = {shard: headers[shard] for shard in sorted(set(weight_map.values())) if shard in headers}
    for shard in sorted(set(weight_map.values()) - listing.keys()):
        yield f"{INDEX_NAME} names the shard {shard}, which is missing."
    for shard in sorted(headers.keys() - named.keys()):
        yield f"{shard} is there, but {INDEX_NAME} does not name it."
    yield from limited(
        f"{INDEX_NAME} places tensor {name} in {shard}, which lacks it."
        for name, shard in sorted(weight_map.items())
        if shard in named and name not in named[shard].tensors
    )
    yield from limited(
        f"Tensor {name} of {shard} is not in {INDEX_NAME}, or placed elsewhere by it."
        for shard, header in named.items()
        for name in header.tensors
        if weight_map.get(name) != shard
    )
    total = sum(entry.size_bytes for header in named.values() for entry in header.tensors.values())
    metadata = read_json(store, listing[INDEX_NAME]).get("metadata")
    promised = metadata.get("total_size") if isinstance(metadata, dict) else None
    if promised != total:
        yield f"{INDEX_NAME} gives a total_size of {promised} bytes, the tensors have {total}."


def _scale_findings(store: Store, info: ObjectInfo, header: Header) -> Iterator[str]:
    for entry in header.tensors.values():
        if entry.name.endswith(_SCALE_ENDINGS) or entry.name in ("weight_scale", "scales"):
            (view,) = store.read_ranges(info, [(entry.start, entry.end)])
            wrong = _unusable_scales(tensor_of(view, entry))
            if wrong:
                yield f"{wrong} of the {entry.num_values} scales of {entry.name} are zero, infinite or NaN."


def _unusable_scales(scales: torch.Tensor) -> int:
    if not scales.is_floating_point():
        return 0
    # float8 types lack these comparisons; fp32 holds all their values.
    values = scales.float()
    return int((~torch.isfinite(values) | (values == 0)).sum())


def _sentence(error: CheckpointError) -> str:
    return f"{error}."
