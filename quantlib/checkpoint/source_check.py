"""Accounts for every tensor of a source in the output that was made from it, and for every one of the output.

A source tensor is in the output byte for byte, or quantized (the packed tensors of all linears it holds are
there, with the dtypes and shapes that their scheme asks for), or a bias that was corrected, or split into the
biases of several linears, or dropped with a reason that the report gives. Which of these it is, the output's
headers say; the report is compared with it. Nothing else may be in the output. Left out: whether codes are
good ones.
"""

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.checkpoint.compare import differing_bytes
from quantlib.checkpoint.findings import limited
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.linear_check import packed_findings, split_bias_findings
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source_linears import SourceLinear, SourceLinears
from quantlib.job.accounts import COPIED, CORRECTED, DROPPED, QUANTIZED, Account, pattern_of, summed_up
from quantlib.packing import FORMATS, PackingFormat, format_of
from quantlib.packing.outliers import all_packed_names
from quantlib.storage import Store
from quantlib.strided_view import StoredPart


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheck:
    """What became of a source.

    Attributes:
        accounts: Of all source tensors that could be accounted for; reasons are the report's.
        findings: One sentence for each fault.
    """

    accounts: tuple[Account, ...]
    findings: tuple[str, ...]


def check_source(
    store: Store,
    output: Checkpoint,
    source_store: Store,
    source: Checkpoint,
    report: Mapping[str, Any],
) -> SourceCheck:
    """Account for all tensors of a source and of the output.

    Args:
        store: The store the output lies in.
        output: What can be read of it; without the tensors of shards that are damaged or missing.
        source_store: The store the source lies in.
        source: What the output was made from.
        report: The run's; what cannot be understood of it is passed over.

    Raises:
        CheckpointError: An object was replaced meanwhile.

    Cost: reads every copied tensor on both sides; about 320 MiB of memory. Loads the skeleton of the source.
    """
    linears = SourceLinears(source)
    gone = [name for name in source.tensors if name not in output.tensors]
    # 8-bit floats keep the name of the weight they stand for.
    packed = {
        name: found for name in source.tensors if (found := _packed(linears.weights(name), name, output))
    }
    split = {name: found for name in gone if (found := _split(linears.split_biases(name), output))}
    states = dict(_states(source, output, packed, split, report))
    copied = [name for name, state in states.items() if state == COPIED and name not in split]
    lost = sorted(source.tensors.keys() - states.keys())
    strays = sorted(output.tensors.keys() - _explained(source, output, packed, split))
    findings = [
        *limited(
            f"Tensor {name} of the source is neither kept, nor quantized, nor dropped with a reason."
            for name in lost
        ),
        *limited(_kind_findings(source, output, states)),
        *limited(_byte_findings(store, output, source_store, source, copied)),
        *packed_findings(source, output, packed),
        *limited(split_bias_findings(store, output, source_store, source, split)),
        *limited(f"Tensor {name} is in the output and comes from nothing in the source." for name in strays),
        *(_unknown_structure(linears) if lost and strays else ()),
        *limited(
            f"Tensor {name} is in the output, though the report says that it was dropped."
            for name in sorted(_dropped(report).keys() & output.tensors.keys())
        ),
        *limited(_report_findings(states, report)),
    ]
    return SourceCheck(
        accounts=_accounts(source, states, report),
        findings=tuple(findings),
    )


def _packed(linears: Sequence[SourceLinear], weight: str, output: Checkpoint) -> Sequence[SourceLinear]:
    """All that read a weight where any has a packed tensor in the output, else none."""
    names = (name for linear in linears for name in _packed_names(linear, output))
    return linears if any(name in output.tensors for name in names if name != weight) else ()


def _split(biases: Mapping[str, StoredPart], output: Checkpoint) -> Mapping[str, StoredPart]:
    """All of them where any is in the output, else none."""
    return biases if any(name in output.tensors for name in biases) else {}


def _packed_names(linear: SourceLinear, output: Checkpoint) -> Iterator[str]:
    """What the packed tensors of a linear may be called."""
    for packer in _packers(output):
        yield from all_packed_names(packer, linear.name)


def _packers(output: Checkpoint) -> Sequence[PackingFormat]:
    # Of an output that lacks its config.json, which is a finding of its own, it may be any.
    packer = format_of(output.config)
    return tuple(FORMATS.values()) if packer is None else (packer,)


def _states(
    source: Checkpoint,
    output: Checkpoint,
    packed: Container[str],
    split: Container[str],
    report: Mapping[str, Any],
) -> Iterator[tuple[str, str]]:
    corrected, dropped = _corrected(report), _dropped(report)
    for name in source.tensors:
        if name in packed:
            yield name, QUANTIZED
        elif name in output.tensors:
            yield name, CORRECTED if name in corrected else COPIED
        elif name in split:
            yield name, COPIED
        elif name in dropped:
            yield name, DROPPED


def _explained(
    source: Checkpoint,
    output: Checkpoint,
    packed: Mapping[str, Sequence[SourceLinear]],
    split: Mapping[str, Collection[str]],
) -> set[str]:
    """Names of all that may be in the output."""
    names = {*source.tensors, *(name for biases in split.values() for name in biases)}
    for linears in packed.values():
        names.update(name for linear in linears for name in _packed_names(linear, output))
    return names


def _unknown_structure(linears: SourceLinears) -> Iterator[str]:
    if linears.error is not None:
        yield f"Which linears the tensors of the source hold cannot be told: {linears.error}."


def _kind_findings(source: Checkpoint, output: Checkpoint, states: Mapping[str, str]) -> Iterator[str]:
    for name, before in sorted(source.tensors.items()):
        now = output.tensors.get(name)
        if states.get(name) in (COPIED, CORRECTED) and now is not None and not _is_alike(before, now):
            yield (
                f"Tensor {name} was {before.dtype} {list(before.shape)} in the source and is"
                f" {now.dtype} {list(now.shape)}."
            )


def _is_alike(one: TensorEntry, other: TensorEntry) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _byte_findings(
    store: Store, output: Checkpoint, source_store: Store, source: Checkpoint, copied: Sequence[str]
) -> Iterator[str]:
    pairs = [(output.tensors[name], source.tensors[name]) for name in copied]
    same = [(now, before) for now, before in pairs if _is_alike(before, now)]
    decoded = source.decoded.keys() | output.decoded.keys()
    stored = [(now, before) for now, before in same if now.name not in decoded]
    differing = differing_bytes(store, output, source_store, source, stored)
    for now, _ in same:
        if now.name in decoded:
            # One at a time: what is decoded is not read in pieces.
            made, there = (
                read_tensors(its_store, checkpoint, [now.name])[now.name].flatten().view(torch.uint8)
                for its_store, checkpoint in ((source_store, source), (store, output))
            )
            if num_bytes := int((made != there).sum()):
                differing[now.name] = num_bytes
    for now, _ in same:
        if now.name in differing:
            yield (
                f"Tensor {now.name} is not as in the source: {differing[now.name]:,} of its"
                f" {now.size_bytes:,} bytes differ."
            )


def _report_findings(states: Mapping[str, str], report: Mapping[str, Any]) -> Iterator[str]:
    """Where the report tells otherwise; it knows names by pattern, of which one may stand in two states."""
    told: dict[str, set[str]] = {}
    for entry in _entries(report):
        for pattern in entry["names"]:
            told.setdefault(pattern, set()).add(entry["state"])
    for name, state in sorted(states.items()):
        found = told.get(pattern_of(name), set())
        if told and state not in found:
            words = " or ".join(sorted(found)) or "nothing of it"
            yield f"Tensor {name} is {state}, the report says {words}."


def _accounts(
    source: Checkpoint, states: Mapping[str, str], report: Mapping[str, Any]
) -> tuple[Account, ...]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in _entries(report):
        for pattern in entry["names"]:
            reasons.setdefault((entry["state"], pattern), []).append(entry["reason"])
    return summed_up(
        (
            name,
            state,
            "; or ".join(reasons.get((state, pattern_of(name)), [])) or "no reason is reported",
            source.tensors[name].size_bytes,
        )
        for name, state in states.items()
    )


def _entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of the report's accounts that can be understood."""
    entries = report.get("tensors")
    return [
        entry
        for entry in (entries if isinstance(entries, list | tuple) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("state"), str)
        and isinstance(entry.get("reason"), str)
        and isinstance(entry.get("names"), list | tuple)
        and all(isinstance(name, str) for name in entry["names"])
    ]


def _dropped(report: Mapping[str, Any]) -> Mapping[str, Any]:
    dropped = report.get("dropped")
    return dropped if isinstance(dropped, dict) else {}


def _corrected(report: Mapping[str, Any]) -> frozenset[str]:
    """Biases that the report says were moved."""
    blocks = report.get("blocks")
    rows = [
        row
        for block in (blocks if isinstance(blocks, list) else ())
        if isinstance(block, dict) and isinstance(block.get("linears"), list)
        for row in block["linears"]
        if isinstance(row, dict)
    ]
    return frozenset(f"{row.get('name')}.bias" for row in rows if row.get("bias_change") is not None)
