"""Where an output came from, and how to make it again: ``quantmill_provenance.json`` beside the shards.

It names the source objects with sizes and etags, the options, digests of the texts, the settings the machine
gave, and versions: all that may change a byte, and nothing about who ran the job. A replay starts from its
options (`with_replayed_values`), takes the machine's settings from it (`recorded_settings`), and goes on only
if what is planned is what was recorded (`check_replay`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantlib.checkpoint.index import Checkpoint, open_checkpoint, read_json
from quantlib.errors import (
    CheckpointError,
    ObjectNotFoundError,
    PlanMismatchError,
    QuantError,
    RecipeError,
    StorageError,
)
from quantlib.job.option_table import check_value
from quantlib.job.options import option_fields
from quantlib.job.plan import Plan
from quantlib.job.staged_output import PUBLICATION_OPTIONS
from quantlib.job.text_sources import TextRecord, with_addresses
from quantlib.storage import normalize_uri, open_store

SCHEMA = 5
PROVENANCE_NAME = "quantmill_provenance.json"
# What the machine decides at the first start, and what is then kept.
MACHINE_SETTINGS = ("threads", "sequences_per_cell", "sequences_per_batch", "compute_dtype")

# Where and by how many a job is run, and what its output is held to, is for whoever repeats it to say.
_NOT_REPEATED = (
    "runner",
    "workers",
    "gpu_model",
    "mixed_gpus",
    "worker_resources",
    "worker_labels",
    "placement",
    "ray_address",
    "storage_engine",
    "checkpoint_every",
    "replay",
    *PUBLICATION_OPTIONS,
)
# A command may hold what is nobody else's business.
_NOT_RECORDED = ("hook",)
_ADDRESSES = ("source", "output")
_EVALUATION = ("evaluation", "evaluation_sequences", "sequence_length", "text_column")
_OR_NONE = type(None)
# What a replay reads: path within the file -> type.
_WANTED: dict[tuple[str, ...], tuple[type, ...]] = {
    ("identity",): (str,),
    ("source", "uri"): (str,),
    ("source", "objects"): (list,),
    ("source", "config_digest"): (str,),
    ("source", "header_digest"): (str,),
    ("options", "given"): (dict,),
    ("options", "effective"): (dict,),
    ("calibration", "digest"): (str, _OR_NONE),
    ("calibration", "texts"): (list,),
    ("evaluation", "digest"): (str, _OR_NONE),
    ("machine", "threads"): (int,),
    ("machine", "sequences_per_cell"): (int,),
    ("machine", "sequences_per_batch"): (int,),
    ("machine", "compute_dtype"): (str,),
    ("machine", "device_kind"): (str,),
    ("machine", "device_kinds"): (list,),
    ("output",): (str,),
    ("format_version",): (str,),
    ("versions",): (dict,),
}


def build_provenance(
    plan: Plan,
    checkpoint: Checkpoint | None = None,
    *,
    shards: Sequence[Mapping[str, Any]] = (),
    device_kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """The provenance of a plan's output, as JSON values.

    Only options of the table are taken over: nothing of the environment, and no credential, can get in.

    Args:
        plan: What was done.
        checkpoint: The source, where it is open already; else its headers are read.
        shards: ``name``, ``sha256`` and ``size_bytes`` of what was written, where known.
        device_kinds: Kinds of device that took part; only the plan's unless named.
    """
    if checkpoint is None:
        checkpoint = _opened(plan)
    values = {
        "schema": SCHEMA,
        "tool": f"quantmill {plan.versions['quantmill']}",
        "identity": plan.identity(),
        "model_type": plan.model_type,
        "source": {
            "uri": plan.source,
            "format": plan.source_format,
            "objects": [
                {"name": name, "size_bytes": size, "etag": etag}
                for name, (size, etag) in sorted(plan.source_objects.items())
            ],
            "config_digest": plan.config_digest,
            "header_digest": _header_digest(checkpoint),
        },
        "output": plan.output,
        "options": {"given": _options_given(plan), "effective": _options_effective(plan)},
        "calibration": _text(plan.calibration_digest, plan.calibration_texts),
        "evaluation": _text(plan.evaluation_digest, plan.evaluation_texts),
        "machine": {
            "device_kind": plan.device_kind,
            "device_kinds": list(device_kinds) or [plan.device_kind],
            "threads": plan.threads,
            "sequences_per_cell": plan.sequences_per_cell,
            "sequences_per_batch": plan.sequences_per_batch,
            "compute_dtype": plan.compute_dtype,
        },
        "format_version": plan.format_version,
        "versions": dict(plan.versions),
        "shards": [{key: row[key] for key in ("name", "sha256", "size_bytes")} for row in shards],
    }
    return json.loads(json.dumps(values))  # tuples become lists: what is built equals what is read


def _opened(plan: Plan) -> Checkpoint:
    return open_checkpoint(open_store(plan.source, plan.options["storage_engine"]), plan.source)


def _options_given(plan: Plan) -> dict[str, Any]:
    names = (name for name in option_fields() if name not in _NOT_RECORDED)
    return {name: plan.options[name] for name in names if name in plan.options}


def _options_effective(plan: Plan) -> dict[str, Any]:
    """The options with what the plan decided filled in, addresses in full."""
    settled = {
        "source": plan.source,
        "output": plan.output,
        "work": plan.work,
        "threads_per_worker": plan.threads,
        "device": plan.device_kind.partition("-")[0],
    }
    if plan.calibration_digest is not None:
        settled["calibration"] = with_addresses(plan.options["calibration"], full_address)
    if plan.evaluation_digest is not None:
        settled["evaluation"] = full_address(plan.options["evaluation"])
    return {**_options_given(plan), **settled}


def _text(digest: str | None, texts: Sequence[TextRecord]) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(text), "uri": full_address(text.uri)} for text in texts]
    return {"digest": digest, "texts": rows}


def full_address(uri: str) -> str:
    """The address of a text as it is recorded."""
    # Text is read by another client, which takes spellings that the stores refuse.
    try:
        return normalize_uri(uri)
    except StorageError:
        return uri


def _header_digest(checkpoint: Checkpoint) -> str:
    """sha256 over names, dtypes, shapes and places of all stored tensors."""
    entries = [dataclasses.astuple(entry) for _, entry in sorted(checkpoint.stored.items())]
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()


def read_provenance(uri: str, engine: str) -> dict[str, Any]:
    """A stored provenance, checked for all that a replay reads.

    Args:
        uri: Address of the file, in any spelling.
        engine: Client library for S3.

    Raises:
        RecipeError: There is none, it is none, or another schema version wrote it.
        StorageError: The store cannot be reached.
    """
    uri = normalize_uri(uri)
    store = open_store(uri, engine)
    try:
        values = read_json(store, store.head(uri))
    except ObjectNotFoundError as error:
        raise RecipeError(
            f"there is no {uri}; replay takes the address of a {PROVENANCE_NAME}", option="replay", uri=uri
        ) from error
    except CheckpointError as error:
        raise RecipeError(f"replay: {error}", option="replay", uri=uri) from error
    if values.get("schema") != SCHEMA:
        raise RecipeError(
            f"{uri} has schema {values.get('schema')!r}, this version replays {SCHEMA}; name a"
            f" {PROVENANCE_NAME}, and use the version that wrote it",
            option="replay",
            uri=uri,
        )
    fault = next(_faults(values), None)
    if fault is not None:
        raise RecipeError(
            f"{uri} is no provenance that can be replayed: {fault}; take the file as it was written",
            option="replay",
            uri=uri,
        )
    return values


def is_provenance(values: Mapping[str, Any]) -> bool:
    """Whether JSON values are a provenance of this version's schema."""
    return values.get("schema") == SCHEMA and next(_faults(values), None) is None


def _faults(values: Mapping[str, Any]) -> Iterator[str]:
    for path, kinds in _WANTED.items():
        found: Any = values
        for name in path:
            found = found.get(name, ...) if isinstance(found, dict) else ...
        # A JSON true is an int to isinstance.
        if not isinstance(found, kinds) or isinstance(found, bool):
            yield f"{'.'.join(path)} is {'missing' if found is ... else repr(found)}"
            return
    for entry in values["calibration"]["texts"]:
        if not isinstance(entry, dict):
            yield f"{entry!r} in calibration.texts is no record of a text"
    for entry in values["source"]["objects"]:
        kinds = {"name": str, "size_bytes": int, "etag": str}
        if not isinstance(entry, dict) or not all(isinstance(entry.get(n), k) for n, k in kinds.items()):
            yield f"{entry!r} in source.objects lacks a name, size_bytes or etag"


def recorded_options(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Option values a replay starts from: all but those that say where and by how many it is run.

    Addresses are given in full, and device and threads as they were in the end.
    """
    effective = provenance["options"]["effective"]
    return {name: value for name, value in effective.items() if name not in _NOT_REPEATED}


def recorded_settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the machine decided then and a replay must not decide anew.

    Returns:
        Those of `MACHINE_SETTINGS`.
    """
    return {name: provenance["machine"][name] for name in MACHINE_SETTINGS}


def with_replayed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Option values completed from the provenance they name with ``replay``; unchanged without one.

    A value that is given, and not None, wins over the recorded one. Doing it twice changes nothing.

    Args:
        values: Plain values from any front end, not validated yet.

    Raises:
        RecipeError: Only one of source and output is given, or the file is no provenance.
        StorageError: The file cannot be read. All of these carry ``before_work``.
    """
    if values.get("replay") is None:
        return dict(values)
    try:
        return _completed({name: value for name, value in values.items() if value is not None})
    except QuantError as error:
        error.before_work = True
        raise


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    table = option_fields()
    engine = given.get("storage_engine", table["storage_engine"][0].default)
    for name, value in (("replay", given["replay"]), ("storage_engine", engine)):
        check_value(name, value, table[name][0])
    missing = [name for name in _ADDRESSES if name not in given]
    if len(missing) == 1:
        raise RecipeError(
            f"a replay takes both source and output, or neither (then the recorded ones are used);"
            f" {missing[0]} is missing",
            option=missing[0],
        )
    base = recorded_options(read_provenance(given["replay"], engine))
    if not missing:
        base.pop("work", None)  # it belongs to the recorded output
    return {**base, **given}


def check_replay(provenance: Mapping[str, Any], plan: Plan, checkpoint: Checkpoint | None = None) -> None:
    """Make sure that a plan repeats a recorded run: equal in all that may change a written byte.

    A source at the recorded address must consist of the recorded objects, by size and etag. Elsewhere etags
    differ by nature; there the sizes of all objects, the content of ``config.json`` and the headers of all
    shards are compared, which another checkpoint of the same architecture may pass: compare the outputs then.
    The evaluation text changes no byte; its tokens are compared where the options name the recorded text.

    Where several kinds of device took part, or others are allowed to, equal bytes cannot be promised: that is
    accepted with ``mixed_gpus`` only.

    Args:
        provenance: Of the recorded run.
        plan: What would be done.
        checkpoint: The source, where it is open already; else its headers are read if they are needed.

    Raises:
        PlanMismatchError: Names the first difference.
        CheckpointError: The source, which lies elsewhere, cannot be opened.
    """
    difference = next(_differences(provenance, plan, checkpoint), None)
    if difference is not None:
        raise PlanMismatchError(
            f"the run recorded for {provenance['output']} cannot be repeated: {difference};"
            " make it as it was, or start a run of its own without replay",
            output=provenance["output"],
        )


def _differences(provenance: Mapping[str, Any], plan: Plan, checkpoint: Checkpoint | None) -> Iterator[str]:
    yield from _source_differences(provenance["source"], plan, checkpoint)
    machine = provenance["machine"]
    for what, recorded, found in (
        *_version_pairs(provenance["versions"], plan.versions),
        ("format_version", provenance["format_version"], plan.format_version),
        ("device_kind", machine["device_kind"], plan.device_kind),
        *_device_pairs(machine, plan),
        ("compute_dtype", machine["compute_dtype"], plan.compute_dtype),
        ("threads of a worker", machine["threads"], plan.threads),
        *_option_pairs(provenance, plan),
        *_text_pairs(provenance, plan),
        ("digest of the calibration tokens", provenance["calibration"]["digest"], plan.calibration_digest),
        *_cell_pairs(provenance, plan),
        *_evaluation_pairs(provenance, plan),
    ):
        if recorded != found:
            yield f"{what} was {recorded}, now {found}"
    objects = {row["name"]: (row["size_bytes"], row["etag"]) for row in provenance["source"]["objects"]}
    # Etags were compared above, or could not be.
    if dataclasses.replace(plan, source_objects=objects).identity() != provenance["identity"]:
        yield "the layout of the plan differs"


def _source_differences(
    recorded: Mapping[str, Any], plan: Plan, checkpoint: Checkpoint | None
) -> Iterator[str]:
    is_elsewhere = plan.source != recorded["uri"]
    objects = {row["name"]: row for row in recorded["objects"]}
    for name in sorted({*objects, *plan.source_objects}):
        if name not in plan.source_objects:
            yield f"the source has no {name} any more"
        elif name not in objects:
            yield f"the source had no {name}"
        else:
            yield from _object_difference(objects[name], plan.source_objects[name], is_elsewhere)
    if recorded["config_digest"] != plan.config_digest:
        yield "config.json of the source was replaced"
    if is_elsewhere and _header_digest(checkpoint or _opened(plan)) != recorded["header_digest"]:
        yield f"the shards of {plan.source} have other headers than those of {recorded['uri']}"


def _object_difference(
    recorded: Mapping[str, Any], found: tuple[int, str], is_elsewhere: bool
) -> Iterator[str]:
    size, etag = found
    name = recorded["name"]
    if recorded["size_bytes"] != size:
        yield f"{name} of the source had {recorded['size_bytes']} bytes, now {size}"
    elif recorded["etag"] != etag and not is_elsewhere:
        yield f"{name} of the source was replaced (its etag was {recorded['etag']}, now {etag})"


_Pair = tuple[str, Any, Any]


def _version_pairs(recorded: Mapping[str, str], found: Mapping[str, str]) -> Iterator[_Pair]:
    for name in sorted({*recorded, *found}):
        yield f"version of {name}", recorded.get(name), found.get(name)


def _device_pairs(machine: Mapping[str, Any], plan: Plan) -> Iterator[_Pair]:
    if not plan.options["mixed_gpus"]:
        yield "kinds of device (mixed_gpus)", machine["device_kinds"], [plan.device_kind]


def _option_pairs(provenance: Mapping[str, Any], plan: Plan) -> Iterator[_Pair]:
    given = provenance["options"]["given"]
    planned = json.loads(json.dumps(_options_given(plan)))
    for name, (_, option) in option_fields().items():
        if option.in_identity:
            yield name, given.get(name), planned.get(name)


def _text_pairs(provenance: Mapping[str, Any], plan: Plan) -> Iterator[_Pair]:
    """Of calibration text all but the addresses, which may be others by now."""
    recorded, planned = provenance["calibration"]["texts"], plan.calibration_texts
    yield "number of calibration texts", len(recorded), len(planned)
    for before, now in zip(recorded, planned, strict=False):
        for name in ("weight", "sequences", "column", "template_digest", "digest"):
            yield f"{name} of calibration text {now.uri}", before.get(name), getattr(now, name)


def _cell_pairs(provenance: Mapping[str, Any], plan: Plan) -> Iterator[_Pair]:
    # Without calibration nothing is summed over cells.
    if plan.calibration_digest is not None:
        machine = provenance["machine"]
        yield "sequences in a cell", machine["sequences_per_cell"], plan.sequences_per_cell
        yield "sequences in a batch", machine["sequences_per_batch"], plan.sequences_per_batch


def _evaluation_pairs(provenance: Mapping[str, Any], plan: Plan) -> Iterator[_Pair]:
    recorded, planned = provenance["options"]["effective"], _options_effective(plan)
    if all(recorded.get(name) == planned.get(name) for name in _EVALUATION):
        yield "digest of the evaluation tokens", provenance["evaluation"]["digest"], plan.evaluation_digest
