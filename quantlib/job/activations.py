"""Checkpoints of the activations: where streams stood, so that a resumed job need not run from the start.

Below the work prefix: ``activations/block-00012/calibration-00003.safetensors`` holds what cell 3 of the
calibration rows feeds into block 12 (``main``, and ``quantized`` where two streams run, ``quantized-1`` and
so on for further outputs), and ``activations/block-00012.json`` is written last, once all cells are there,
with their digests. Cells do not depend on the number of workers, so any crew can take them up. The newest
complete checkpoint is kept.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantlib.errors import PlanMismatchError
from quantlib.job.plan import Plan
from quantlib.storage import Store, join_uri, uri_name

SCHEMA = 2
CALIBRATION, EVALUATION = "calibration", "evaluation"
_MANIFEST = re.compile(r"block-(\d{5,})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationCheckpoint:
    """A complete set of streams.

    Attributes:
        identities: Of the plans whose streams these are, in the order of the quantized ones.
        evaluation_digest: Of the evaluation rows that ran beside; it is not part of the identity.
        block: The block the streams stand before.
        cells: Cell key -> [sha256, size in bytes] of its object.
        block_errors: Identity -> block -> errors of the quantized stream, for the blocks before.
        excluded_rows: Calibration rows left out so far.
    """

    schema: int = SCHEMA
    identities: tuple[str, ...]
    evaluation_digest: str | None
    block: int
    cells: Mapping[str, tuple[str, int]]
    block_errors: Mapping[str, Mapping[int, Mapping[str, Any]]]
    excluded_rows: tuple[int, ...]


def cells_of(plan: Plan) -> dict[str, list[str]]:
    """Keys of all cells: ``calibration`` and ``evaluation`` -> those of the corpus, in order."""
    rows = {CALIBRATION: plan.options["sequences"], EVALUATION: plan.options["evaluation_sequences"]}
    if plan.calibration_digest is None:
        rows[CALIBRATION] = 0
    if plan.evaluation_digest is None:
        rows[EVALUATION] = 0
    return {
        corpus: [cell_key(corpus, number) for number in range(-(-count // plan.sequences_per_cell))]
        for corpus, count in rows.items()
    }


def cell_key(corpus: str, number: int) -> str:
    """``calibration-00003``: the name of a cell within a checkpoint."""
    return f"{corpus}-{number:05d}"


def corpus_of(key: str) -> str:
    """``calibration`` or ``evaluation``."""
    return key.rpartition("-")[0]


def cell_number(key: str) -> int:
    """The place of a cell within its corpus."""
    return int(key.rpartition("-")[2])


def cell_uri(work: str, block: int, key: str) -> str:
    """Where the streams of one cell are kept."""
    return join_uri(_folder_uri(work, block), f"{key}.safetensors")


def complete_checkpoint(store: Store, work: str, checkpoint: ActivationCheckpoint) -> None:
    """Declare a checkpoint whole and remove the older ones."""
    store.write(_manifest_uri(work, checkpoint.block), json.dumps(asdict(checkpoint)).encode())
    remove_checkpoints(store, work, before=checkpoint.block)


def newest_checkpoint(store: Store, plans: Sequence[Plan]) -> ActivationCheckpoint | None:
    """The last complete checkpoint of these plans and their evaluation rows, or None.

    Args:
        plans: Of outputs that are made together; the checkpoints lie in the work prefix of the first.

    Raises:
        PlanMismatchError: A checkpoint of another plan, or written under another schema, lies there.
    """
    first, found = plans[0], {}
    for info in store.list(join_uri(first.work, "activations"), recursive=False):
        named = _MANIFEST.fullmatch(uri_name(info.uri))
        if named is None:
            raise PlanMismatchError(
                f"{info.uri} is no checkpoint of this job; remove it, or {first.work} to start over",
                uri=info.uri,
            )
        found[int(named[1])] = info.uri
    if not found:
        return None
    uri = found[max(found)]
    try:
        values = json.loads(store.read(uri))
        schema, identities = values["schema"], values.get("identities", ())
        evaluation_digest = values["evaluation_digest"]
    except (ValueError, TypeError, KeyError) as error:
        raise PlanMismatchError(
            f"{uri} is no checkpoint of activations; remove it, and the job goes on without", uri=uri
        ) from error
    if schema != SCHEMA or first.identity() not in identities:
        names = ", ".join(str(identity)[:12] for identity in identities)
        raise PlanMismatchError(
            f"{uri} was written by another plan or version (schema {schema!r}, plans {names}); remove"
            f" {first.work} to start over",
            uri=uri,
        )
    # Made together with fewer recipes than now, it lacks the streams of some.
    is_whole = all(plan.identity() in identities for plan in plans)
    if not is_whole or evaluation_digest != first.evaluation_digest:
        return None
    return ActivationCheckpoint(
        **{
            **values,
            "cells": {key: (cell[0], cell[1]) for key, cell in values["cells"].items()},
            "identities": tuple(identities),
            "block_errors": {
                identity: {int(block): found for block, found in errors.items()}
                for identity, errors in values["block_errors"].items()
            },
            "excluded_rows": tuple(values["excluded_rows"]),
        }
    )


def remove_checkpoints(store: Store, work: str, before: int | None = None) -> None:
    """Remove every checkpoint, or those before a block; manifests first, so that none misses a cell."""
    listed = [info.uri for info in store.list(join_uri(work, "activations"))]
    if before is not None:
        # Zeros in front make their order that of the blocks.
        listed = [uri for uri in listed if uri < _folder_uri(work, before)]
    for uri in sorted(listed, key=lambda uri: not uri.endswith(".json")):
        store.delete(uri)


def _folder_uri(work: str, block: int) -> str:
    return join_uri(work, "activations", f"block-{block:05d}")


def _manifest_uri(work: str, block: int) -> str:
    return _folder_uri(work, block) + ".json"
