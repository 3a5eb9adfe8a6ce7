"""The plan: a recipe applied to a model, as plain data.

Everything a run needs to know before the first weight byte is read: blocks, their linears and input
groups, the units to write with every tensor's name, dtype and shape, and the settings that may change a
byte. Workers, flows and the report all read it; nobody edits it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantlib.errors import PlanMismatchError
from quantlib.job.accounts import Account
from quantlib.job.options import option_fields
from quantlib.job.text_sources import TextRecord
from quantlib.schemes import ActivationScheme, WeightScheme
from quantlib.strided_view import StoredPart, StridedView

SCHEMA = 6

# Where things lie, what is only measured, and what tells in other words what the rest says.
_NOT_IN_IDENTITY = (
    "source",
    "output",
    "work",
    "evaluation_digest",
    "accounts",
    "calibration_texts",
    "evaluation_texts",
    "experts_per_token",
    "decoding_bytes",
    "output_bytes",
)

# Numbers of input groups of a block.
Groups = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, safetensors dtype ("BF16", "I32", ...) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """One linear of a block.

    Attributes:
        name: Full module name, as in the checkpoint without ``.weight``.
        path: Of the module, inside the block.
        experts: Path of the module of routed experts it is in; None for one that every token goes through.
        rows: Out features.
        columns: In features.
        method: ``gptq`` or ``rtn``; None when the linear is kept as it is.
        scheme: None when the linear is kept as it is.
        num_outliers: How many of its columns are kept beside the codes.
        num_outlier_weights: How many single weights of each row are.
        corrects_bias: Whether it has a bias that makes up for what rounding does to its mean output.
        weight: Where its weight [rows, columns] is read from.
        weight_dtype: Its safetensors dtype there.
        split_bias: Where its bias is read from, if that is a part of a tensor and is written by itself.
    """

    name: str
    path: str
    experts: str | None = None
    rows: int
    columns: int
    method: str | None
    scheme: WeightScheme | None
    num_outliers: int = 0
    num_outlier_weights: int = 0
    corrects_bias: bool
    weight: StoredPart
    weight_dtype: str
    split_bias: StoredPart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """One decoder block.

    Attributes:
        index: 0-based position.
        prefix: Module name (``model.layers.17``).
        tensors: Checkpoint names of all its source tensors.
        linears: Its linears that can be quantized, quantized or kept.
        input_groups: Names of quantized linears that read the same tensor, one tuple a group.
    """

    index: int
    prefix: str
    tensors: tuple[str, ...]
    linears: tuple[LinearPlan, ...]
    input_groups: tuple[tuple[str, ...], ...]

    @property
    def is_calibrated(self) -> bool:
        """Whether statistics are wanted of it."""
        return any(linear.method == "gptq" for linear in self.linears)

    @property
    def centered_groups(self) -> frozenset[int]:
        """Numbers of the input groups whose means are gathered too, for biases that are corrected."""
        corrected = {linear.name for linear in self.linears if linear.corrects_bias}
        return frozenset(n for n, group in enumerate(self.input_groups) if corrected.intersection(group))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedMatrix:
    """A matrix outside the blocks, embedding or head, that is rounded to nearest.

    Attributes:
        name: Full module name.
        weight: Its source tensor.
        scheme: How it is stored.
    """

    name: str
    weight: TensorSpec
    scheme: WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlan:
    """What one output shard holds; the smallest resumable piece of work.

    Attributes:
        name: ``block-00017``, ``prelude-00000``, ``tail-00000``.
        stage: ``prelude`` (written first), ``block``, or ``tail`` (written last).
        block: Index of the block, None outside the blocks.
        shard: Final file name.
        tensors: Everything in the shard, in file order.
        copied: Names among them that are copied from the source byte for byte.
        rounded: What others of them are made from, outside the blocks.
    """

    name: str
    stage: str
    block: int | None
    shard: str
    tensors: tuple[TensorSpec, ...]
    copied: tuple[str, ...]
    rounded: tuple[RoundedMatrix, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Source tensors that are copied or rounded; those of a block's linears are not among them."""
        return (*self.copied, *(matrix.weight.name for matrix in self.rounded))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole job.

    Attributes:
        source: URI of the source checkpoint.
        source_format: What its weights are stored as: ``safetensors``, ``fp8``, ``gguf``, ...
        source_objects: Object name -> (size in bytes, etag) of every source object read.
        output: URI of the output.
        work: URI of the work prefix.
        options: The validated options, as JSON values.
        config_digest: sha256 of the source's ``config.json``.
        model_type: ``config.json``'s.
        blocks: Ordered decoder blocks.
        units: Everything to write, in shard order.
        kept_linears: Linears that stay as they are and that no rule can name: the head, routers, and modules
            of matrices that the model does not use.
        tail_tensors: Checkpoint names of the tensors used after the last block (norm, head; a tied
            embedding too).
        prelude_tensors: Checkpoint names of the tensors used before the first block.
        dropped: Source tensor -> reason it is not in the output.
        accounts: What becomes of all source tensors, and why.
        side_files: Names of files copied beside the shards, or made from what the source holds.
        compute_dtype: ``bfloat16``, ``float16`` or ``float32`` of both streams.
        device_kind: ``cpu-avx2``, ``cuda-sm90-nvidia-h200``, ...; of the first start with ``mixed_gpus``.
        threads: CPU threads of a worker.
        sequences_per_cell: Sequences in a cell (the last may hold fewer).
        sequences_per_batch: Sequences of a cell that go through a block at a time.
        calibration_digest: sha256 of the calibration token rows; None without calibration.
        evaluation_digest: sha256 of the evaluation token rows; None without evaluation.
        calibration_texts: Where the calibration token rows come from; empty without calibration.
        evaluation_texts: Likewise for evaluation.
        experts_per_token: To how many routed experts a token goes.
        decoding_bytes: Unit -> what reading its source tensors takes beside them, where some are stored as
            codes.
        output_bytes: Of all shards, as they will be written.
        versions: Of this tool and of the libraries that compute.
        format_version: Layout version of the output format.
    """

    schema: int = SCHEMA
    source: str
    source_format: str
    source_objects: Mapping[str, tuple[int, str]]
    output: str
    work: str
    options: Mapping[str, Any]
    config_digest: str
    model_type: str
    blocks: tuple[BlockPlan, ...]
    units: tuple[UnitPlan, ...]
    kept_linears: tuple[str, ...]
    tail_tensors: tuple[str, ...]
    prelude_tensors: tuple[str, ...]
    dropped: Mapping[str, str]
    accounts: tuple[Account, ...]
    side_files: tuple[str, ...]
    compute_dtype: str
    device_kind: str
    threads: int
    sequences_per_cell: int
    sequences_per_batch: int
    calibration_digest: str | None
    evaluation_digest: str | None
    calibration_texts: tuple[TextRecord, ...]
    evaluation_texts: tuple[TextRecord, ...]
    experts_per_token: int
    decoding_bytes: Mapping[str, int] = field(default_factory=dict)
    output_bytes: int = 0
    versions: Mapping[str, str]
    format_version: str

    @property
    def has_streams(self) -> bool:
        """Whether activations flow at all: for calibration, for evaluation or for both."""
        return self.calibration_digest is not None or self.evaluation_digest is not None

    @property
    def rounded(self) -> tuple[RoundedMatrix, ...]:
        """Matrices outside the blocks that are rounded to nearest."""
        return tuple(matrix for unit in self.units for matrix in unit.rounded)

    @property
    def schemes(self) -> dict[str, WeightScheme | None]:
        """Every linear of the blocks and its scheme, None if it is kept, and what is rounded outside them."""
        return schemes_of(self.blocks) | {matrix.name: matrix.scheme for matrix in self.rounded}

    @property
    def block_units(self) -> dict[int, UnitPlan]:
        """Block index -> the unit that holds it."""
        return {u.block: u for u in self.units if u.block is not None}

    def identity(self) -> str:
        """sha256 over all that may change a written byte; equal identities give equal outputs.

        Unless ``mixed_gpus`` let other kinds of device take part, which the report and the provenance say.

        Left out: output and work addresses, and the options that say where and with how many workers the
        job runs (`Option.in_identity` is False).
        """
        kept = plan_to_json(self)
        kept["options"] = {
            name: self.options[name] for name, (_, option) in option_fields().items() if option.in_identity
        }
        for name in _NOT_IN_IDENTITY:
            kept.pop(name)
        if self.calibration_digest is None:
            kept.pop("sequences_per_cell")
            kept.pop("sequences_per_batch")
        canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def schemes_of(blocks: tuple[BlockPlan, ...]) -> dict[str, WeightScheme | None]:
    """Every linear of the blocks and its scheme, None for one that is kept, in model order."""
    return {linear.name: linear.scheme for block in blocks for linear in block.linears}


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    return dataclasses.asdict(plan)


def plan_from_json(values: Mapping[str, Any]) -> Plan:
    """The plan that `plan_to_json` wrote.

    Raises:
        PlanMismatchError: Another schema version wrote it.
    """
    if values.get("schema") != SCHEMA:
        raise PlanMismatchError(
            f"the stored plan has schema {values.get('schema')!r}, this version reads {SCHEMA};"
            " finish it with the version that began it or choose another output",
            schema=values.get("schema"),
        )
    fields = dict(values)
    fields["blocks"] = tuple(_block_from_json(b) for b in values["blocks"])
    fields["units"] = tuple(_unit_from_json(u) for u in values["units"])
    fields["source_objects"] = {k: (v[0], v[1]) for k, v in values["source_objects"].items()}
    for name in ("kept_linears", "tail_tensors", "prelude_tensors", "side_files"):
        fields[name] = tuple(values[name])
    for name in ("calibration_texts", "evaluation_texts"):
        fields[name] = tuple(TextRecord(**record) for record in values[name])
    fields["accounts"] = tuple(Account(**{**a, "names": tuple(a["names"])}) for a in values["accounts"])
    return Plan(**fields)


def _block_from_json(values: Mapping[str, Any]) -> BlockPlan:
    linears = tuple(
        LinearPlan(
            **{
                **v,
                "scheme": None if v["scheme"] is None else _scheme_from_json(v["scheme"]),
                "weight": _part_from_json(v["weight"]),
                "split_bias": None if v["split_bias"] is None else _part_from_json(v["split_bias"]),
            }
        )
        for v in values["linears"]
    )
    return BlockPlan(
        index=values["index"],
        prefix=values["prefix"],
        tensors=tuple(values["tensors"]),
        linears=linears,
        input_groups=tuple(tuple(g) for g in values["input_groups"]),
    )


def _scheme_from_json(values: Mapping[str, Any]) -> WeightScheme:
    inputs = values.get("inputs")
    return WeightScheme(**{**values, "inputs": None if inputs is None else ActivationScheme(**inputs)})


def _part_from_json(values: Mapping[str, Any]) -> StoredPart:
    view = values["view"]
    if view is not None:
        shapes = {name: tuple(view[name]) for name in ("whole", "size", "stride")}
        view = StridedView(**shapes, offset=view["offset"])
    return StoredPart(tensor=values["tensor"], view=view)


def _unit_from_json(values: Mapping[str, Any]) -> UnitPlan:
    tensors = tuple(map(_spec_from_json, values["tensors"]))
    rounded = tuple(
        RoundedMatrix(
            name=matrix["name"],
            weight=_spec_from_json(matrix["weight"]),
            scheme=_scheme_from_json(matrix["scheme"]),
        )
        for matrix in values.get("rounded", ())
    )
    return UnitPlan(**{**values, "tensors": tensors, "copied": tuple(values["copied"]), "rounded": rounded})


def _spec_from_json(values: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=values["name"], dtype=values["dtype"], shape=tuple(values["shape"]))
