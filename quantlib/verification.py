"""Verification of an output as a person asks for it: its shards, its source's tensors, another output."""

import dataclasses
from collections.abc import Callable
from typing import Any

from quantlib.checkpoint.compare import compare_checkpoints
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.job.stages import Progress
from quantlib.storage import normalize_uri, open_store


def verify_output(
    output: str,
    *,
    source: str | None = None,
    against: str | None = None,
    storage_engine: str = "obstore",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Re-read every shard of an output and compare it with its record.

    Args:
        output: Address of the output.
        source: Checkpoint whose every tensor is to be accounted for too.
        against: Another output, with which every tensor is compared too.
        storage_engine: Client library for S3.
        on_progress: Called before every shard.

    Returns:
        ``output``, ``shards``, ``tensors``, ``bytes``, ``source``, ``source_tensors`` (what became of them),
        ``findings`` (a sentence each, none when all is well), ``against`` (None, or ``uri``, ``tensors``,
        ``bytes`` and ``findings``).

    Raises:
        QuantError: Something at one of the addresses cannot be read at all.
    """
    uri = normalize_uri(output)
    source = normalize_uri(source) if source else None
    # First, because it looks at both addresses before it reads for long.
    compared = _compared(uri, normalize_uri(against), storage_engine) if against else None
    result = verify_checkpoint(
        open_store(uri, storage_engine),
        uri,
        source_uri=source,
        source_store=open_store(source, storage_engine) if source else None,
        on_progress=on_progress,
    )
    return {
        "output": uri,
        "shards": result.num_shards,
        "tensors": result.num_tensors,
        "bytes": result.num_bytes,
        "source": source,
        "source_tensors": [dataclasses.asdict(account) for account in result.accounts],
        "findings": list(result.findings),
        "against": compared,
    }


def _compared(uri: str, other: str, engine: str) -> dict[str, Any]:
    result = compare_checkpoints(open_store(uri, engine), uri, open_store(other, engine), other)
    return {
        "uri": other,
        "tensors": result.num_tensors,
        "bytes": result.num_bytes,
        "findings": list(result.findings),
    }
