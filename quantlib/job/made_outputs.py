"""Whether an output is made already, from its provenance: no plan is built and no weight or text is read.

A conversion that is started again compares whole plans, with the versions of all libraries and the kind of
device. Here an output counts as made when it came from these very source objects with these options, whatever
made it: an upgrade does not have everything converted again. Calibration text is compared by its address.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantlib.checkpoint.index import CONFIG_NAME, read_json
from quantlib.errors import CheckpointError, ObjectNotFoundError
from quantlib.job.new_checkpoints import SourceFiles
from quantlib.job.options import JobOptions, option_fields
from quantlib.job.provenance import PROVENANCE_NAME, full_address, is_provenance
from quantlib.job.text_sources import with_addresses
from quantlib.storage import Store, join_uri, normalize_uri

# Compared beside the options that are part of an identity; the latter where text was read.
_ALSO_COMPARED = ("portable_scales",)
_OF_TEXT = ("calibration", "text_column", "sequences", "sequence_length", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeOutput:
    """What lies at the address of an output.

    Attributes:
        uri: The address.
        state: ``made``, ``absent`` (not finished, or not begun), or ``other`` (something else is there).
        reason: Of ``other``: what, and what to do.
    """

    uri: str
    state: Literal["made", "absent", "other"]
    reason: str = ""


def is_published(store: Store, output: str) -> bool:
    """Whether a whole checkpoint lies at an address: config.json is the last object that a job writes."""
    try:
        store.head(join_uri(output, CONFIG_NAME))
    except ObjectNotFoundError:
        return False
    return True


def look_at_output(store: Store, request: JobOptions, source: SourceFiles) -> MadeOutput:
    """What lies where a request's output goes.

    Args:
        store: The store of the output.
        request: Of one format.
        source: What the output would be made from.

    Cost: reads the provenance.
    """
    uri = normalize_uri(request.output)
    if not is_published(store, uri):
        return MadeOutput(uri=uri, state="absent")
    difference = next(_differences(_provenance(store, uri), request, source), None)
    if difference is None:
        return MadeOutput(uri=uri, state="made")
    reason = f"{uri} holds another checkpoint: {difference}; move or remove it, or choose another address"
    return MadeOutput(uri=uri, state="other", reason=reason)


def _provenance(store: Store, output: str) -> Mapping[str, Any] | None:
    try:
        values = read_json(store, store.head(join_uri(output, PROVENANCE_NAME)))
    except (ObjectNotFoundError, CheckpointError):
        return None
    return values if is_provenance(values) else None


def _differences(
    provenance: Mapping[str, Any] | None, request: JobOptions, source: SourceFiles
) -> Iterator[str]:
    if provenance is None:
        yield f"it has no {PROVENANCE_NAME} that this version reads"
        return
    recorded = provenance["source"]
    objects = {row["name"]: (row["size_bytes"], row["etag"]) for row in recorded["objects"]}
    for name in sorted(objects.keys() | source.objects.keys()):
        if objects.get(name) != source.objects.get(name):
            yield f"it was made from {recorded['uri']} with another {name} than that of {source.uri}"
    if recorded["config_digest"] != source.config_digest:
        yield f"it was made from {recorded['uri']} with another {CONFIG_NAME} than that of {source.uri}"
    uses_text = provenance["calibration"]["digest"] is not None
    before, now = provenance["options"]["effective"], _options(request)
    for name, (_, option) in option_fields().items():
        is_compared = option.in_identity or name in _ALSO_COMPARED or (uses_text and name in _OF_TEXT)
        if is_compared and before.get(name) != now[name]:
            yield f"it was made with {name} {before.get(name)}, wanted is {now[name]}"


def _options(request: JobOptions) -> dict[str, Any]:
    """The options as a provenance records those that are compared."""
    values = json.loads(json.dumps(dataclasses.asdict(request)))
    if request.calibration is not None:
        values["calibration"] = with_addresses(request.calibration, full_address)
    return values
