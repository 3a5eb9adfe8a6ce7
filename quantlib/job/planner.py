"""From a request and headers to a plan: no weight byte is read, nothing impossible is begun.

`prepare_all` is the first stage of every run: it plans, compares with what an earlier start left behind, and
refuses what cannot be done. `begin` is the second, under the leases of the work prefixes: it stores plans and
tokens and tells what is there already.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from quantlib.calibration.corpus import rows_digest
from quantlib.checkpoint.decoded import decoding_bytes
from quantlib.checkpoint.dtypes import dtype_name, torch_dtype
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.layout import shard_names
from quantlib.checkpoint.shard_forms import ShardForms
from quantlib.checkpoint.source import GGUF_ENDING, open_source
from quantlib.checkpoint.stated_quantization import config_digest
from quantlib.errors import (
    CheckpointError,
    PackingError,
    PlanMismatchError,
    QuantError,
    RecipeError,
    UnsupportedModelError,
)
from quantlib.job.accounting import account
from quantlib.job.activations import newest_checkpoint
from quantlib.job.bundle import Bundle, bundle_of, joined_refusal
from quantlib.job.expert_groups import merged_groups
from quantlib.job.fused_sets import refuse_split_sets
from quantlib.job.manifest import device_kinds, read_plan, read_records, store_plan, tokens_uri
from quantlib.job.options import ALL_EXPERTS, JobOptions
from quantlib.job.plan import (
    BlockPlan,
    LinearPlan,
    Plan,
    RoundedMatrix,
    TensorSpec,
    UnitPlan,
    schemes_of,
)
from quantlib.job.planned_ends import blocks_spec, kept_heads, rounded_ends
from quantlib.job.provenance import MACHINE_SETTINGS, check_replay, read_provenance, recorded_settings
from quantlib.job.report import REPORT_NAME
from quantlib.job.several_formats import only_format
from quantlib.job.staged_output import measured_report
from quantlib.job.target_check import check_target
from quantlib.job.texts import planned_rows
from quantlib.machine import batch_tokens, cell_tokens, compute_dtype, device_kind, may_share
from quantlib.model.families import experts_per_token
from quantlib.model.skeleton import BlockSpec, LinearSpec, Skeleton, load_skeleton
from quantlib.packing import FORMATS, gguf_format, held_scheme
from quantlib.packing.contracts import PackingFormat
from quantlib.packing.specs import packed_on_meta
from quantlib.recipe import refuse_idle_rules, rule_for
from quantlib.solver_settings import weights_per_row
from quantlib.storage import Store, join_uri, normalize_uri, open_store
from quantlib.strided_view import StoredPart
from quantlib.tokens import store_rows

T = TypeVar("T")

_VERSIONED = ("quantmill", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that can be done.

    Attributes:
        options: The request.
        plan: What will be done.
        rows: Token rows by digest.
        report: Of a finished output, which leaves nothing to do; else None.
    """

    options: JobOptions
    plan: Plan
    rows: Mapping[str, torch.Tensor]
    report: Mapping[str, Any] | None


# A source that is open, and its model without weights.
Model = tuple[Checkpoint, Skeleton]


def open_model(options: JobOptions) -> Model:
    """The source of a request; reads headers and configuration only.

    Raises:
        QuantError: It is no checkpoint, or none that can be converted.
    """
    source = normalize_uri(options.source)
    checkpoint = open_source(open_store(source, options.storage_engine), source)
    return checkpoint, load_skeleton(checkpoint.config, list(checkpoint.tensors))


def prepare_all(requests: Sequence[JobOptions], threads: int) -> list[Prepared]:
    """Plan outputs of one source; see `prepare`.

    Raises:
        QuantError: One of the requests cannot be done, or not together with another. What options, format and
            shapes refuse is told of all requests at once.
    """
    model = open_model(requests[0])
    prepared = _of_each(requests, lambda options: prepare(options, threads, model))
    bundle_of([found.plan for found in prepared])
    return prepared


def plan_all(requests: Sequence[JobOptions], threads: int) -> Bundle:
    """What `prepare_all` would plan, whatever is there already.

    Raises:
        QuantError: See `prepare_all`.
    """
    model = open_model(requests[0])
    return bundle_of(_of_each(requests, lambda options: build_plan(options, threads, model=model)[0]))


def _of_each(requests: Sequence[JobOptions], make: Callable[[JobOptions], T]) -> list[T]:
    made: list[T] = []
    refusals: dict[str, QuantError] = {}
    for options in requests:
        try:
            made.append(make(options))
        except (PackingError, RecipeError) as error:
            refusals[normalize_uri(options.output)] = error
    if refusals:
        raise joined_refusal(refusals, [normalize_uri(options.output) for options in requests])
    return made


def prepare(options: JobOptions, threads: int, model: Model | None = None) -> Prepared:
    """Plan an output and compare it with what an earlier start left; only reads.

    Args:
        options: The request.
        threads: CPU threads a worker has, unless the options or an earlier start say otherwise.
        model: The source, where it is open already.

    Raises:
        QuantError: The request cannot be done.
    """
    work_store = open_store(work_uri(options), options.storage_engine)
    output_store = open_store(normalize_uri(options.output), options.storage_engine)
    stored = read_plan(work_store, work_uri(options))
    plan, rows = build_plan(options, threads, stored, model)
    if stored is None:
        _refuse_occupied(output_store, plan.output)
    elif stored.identity() != plan.identity():
        raise PlanMismatchError(
            f"{plan.work} holds another job for this output ({_difference(stored, plan)});"
            " finish that one, choose another output, or remove both to start over",
            work=plan.work,
        )
    else:
        _refuse_mixed_start(device_kinds(work_store, stored), options)
    report = _finished_report(output_store, plan) if stored else None
    return Prepared(options=options, plan=plan, rows=rows, report=report)


def begin(prepared: Sequence[Prepared]) -> dict[str, Any]:
    """Make the work prefixes of outputs ready for a run that holds their leases.

    Returns:
        Of every output ``reports``, of one that another run finished meanwhile, or None, ``staged``, the
        report of one that only waits to be published, or None, and ``records`` of finished units, not yet
        checked; ``checkpoint`` of the activations, or None; ``aborted_uploads``, how many uploads of runs
        that died were given up.

    Raises:
        PlanMismatchError: What is stored belongs to another job.
    """
    plans = [found.plan for found in prepared]
    # Cells are cut from the rows in the first work prefix, whichever output wants them.
    every = {digest: rows_BT for found in prepared for digest, rows_BT in found.rows.items()}
    reports, staged, records, aborted = [], [], [], 0
    for number, found in enumerate(prepared):
        plan, engine = found.plan, found.options.storage_engine
        work_store, output_store = open_store(plan.work, engine), open_store(plan.output, engine)
        store_plan(work_store, plan)
        reports.append(_finished_report(output_store, plan))
        aborted += output_store.abort_uploads(plan.output) + work_store.abort_uploads(plan.work)
        for digest, rows_BT in (found.rows if number else every).items():
            store_rows(work_store, tokens_uri(plan.work, digest), rows_BT)
        records.append(read_records(work_store, plan))
        staged.append(measured_report(work_store, plan))
    home = open_store(plans[0].work, prepared[0].options.storage_engine)
    return {
        "reports": reports,
        "staged": staged,
        "records": records,
        "checkpoint": newest_checkpoint(home, plans),
        "aborted_uploads": aborted,
    }


def build_plan(
    options: JobOptions, threads: int, stored: Plan | None = None, model: Model | None = None
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """The plan of a request, and the token rows it names by digest; only reads.

    Args:
        threads: CPU threads a worker has, unless the options or an earlier start say otherwise.
        stored: The plan of an earlier start: what depends on the machine is taken from it, or else from the
            run that the options repeat.
        model: The source, where it is open already.

    Raises:
        PlanMismatchError: The options repeat a run, and this would be another one.
    """
    replayed = read_provenance(options.replay, options.storage_engine) if options.replay else None
    source = normalize_uri(options.source)
    checkpoint, skeleton = model or open_model(options)
    packer = FORMATS[only_format(options, "an output")]
    blocks = tuple(
        _plan_block(skeleton.block_spec(index), options, packer, checkpoint)
        for index in range(skeleton.num_blocks)
    )
    _refuse_other_layouts(blocks, checkpoint)
    _check_rules(options, skeleton, blocks, checkpoint)
    # A layout may be unable to say what was asked for, such as a mix of schemes: better known now.
    rounded = rounded_ends(options, skeleton, checkpoint)
    kept_linears = (
        *kept_heads(skeleton, checkpoint, rounded),
        *skeleton.kept_linears,
        *_other_matrices(skeleton, checkpoint),
    )
    packer.quantization_config(schemes_of(blocks), kept_linears)
    check_target(options, checkpoint.config, blocks)
    calibrates = any(linear.method == "gptq" for block in blocks for linear in block.linears)
    rows, texts = planned_rows(options, checkpoint, calibrates=calibrates)
    fixed = _settings_of(stored) or (recorded_settings(replayed) if replayed else None)
    first = stored.device_kind if stored else replayed["machine"]["device_kind"] if replayed else None
    kind = _planned_kind(options, first)
    machine = _machine_settings(options, threads, checkpoint, kind, fixed)
    units = _plan_units(skeleton, checkpoint, blocks, packer, rounded)
    dropped = dict(checkpoint.dropped)
    plan = Plan(
        source=source,
        source_format=checkpoint.source_format,
        source_objects={
            name: (info.size_bytes, info.etag)
            for name, info in sorted({**checkpoint.shards, **checkpoint.side_files}.items())
        },
        output=normalize_uri(options.output),
        work=work_uri(options),
        options=dataclasses.asdict(options),
        config_digest=config_digest(checkpoint.config, checkpoint.quantization),
        model_type=skeleton.model_type,
        blocks=blocks,
        units=units,
        kept_linears=kept_linears,
        tail_tensors=tuple(skeleton.tail_tensors),
        prelude_tensors=tuple(skeleton.prelude_tensors),
        dropped=dropped,
        accounts=account(skeleton, checkpoint, blocks, units, dropped),
        side_files=tuple(sorted({*checkpoint.side_files, *checkpoint.made_files})),
        calibration_digest=rows_digest(rows["calibration"]) if "calibration" in rows else None,
        evaluation_digest=rows_digest(rows["evaluation"]) if "evaluation" in rows else None,
        calibration_texts=texts.get("calibration", ()),
        evaluation_texts=texts.get("evaluation", ()),
        versions={name: importlib.metadata.version(name) for name in _versioned(checkpoint, packer)},
        experts_per_token=experts_per_token(checkpoint.config),
        decoding_bytes=_decoding_bytes(checkpoint, blocks, units),
        format_version=packer.FORMAT_VERSION,
        device_kind=kind,
        **machine,
    )
    forms = ShardForms(plan, checkpoint, open_store(source, options.storage_engine))
    plan = dataclasses.replace(plan, output_bytes=forms.num_bytes())
    if replayed is not None:
        check_replay(replayed, plan, checkpoint)
    return plan, {rows_digest(rows_BT): rows_BT for rows_BT in rows.values()}


def _versioned(checkpoint: Checkpoint, packer: PackingFormat) -> tuple[str, ...]:
    # The gguf package decodes the tensors of its files, and writes their headers.
    return (*_VERSIONED, "gguf") if "gguf" in (checkpoint.source_format, packer.NAME) else _VERSIONED


def work_uri(options: JobOptions) -> str:
    """The work prefix of a request: beside the output unless named."""
    return normalize_uri(options.work) if options.work else normalize_uri(options.output) + ".quantmill"


def open_planned_source(store: Store, plan: Plan) -> Checkpoint:
    """The source checkpoint, as long as it is the one that was planned.

    Raises:
        CheckpointError: An object was replaced, or is gone, since the plan was made.
    """
    checkpoint = open_source(store, plan.source)
    if config_digest(checkpoint.config, checkpoint.quantization) != plan.config_digest:
        raise CheckpointError(
            f"config.json of {plan.source} changed since the job was planned; start over with another output",
            uri=plan.source,
        )
    for name, info in {**checkpoint.shards, **checkpoint.side_files}.items():
        if plan.source_objects.get(name) != (info.size_bytes, info.etag):
            raise CheckpointError(
                f"{info.uri} changed since the job was planned; start over with another output", uri=info.uri
            )
    return checkpoint


def _check_rules(
    options: JobOptions, skeleton: Skeleton, blocks: tuple[BlockPlan, ...], checkpoint: Checkpoint
) -> None:
    refuse_idle_rules(
        options,
        [linear.name for block in blocks for linear in block.linears],
        outside=skeleton.outside_linears,
        others=sorted({name.rpartition(".")[0] for name in checkpoint.tensors}),
    )
    for block in blocks:
        refuse_split_sets(skeleton.block_spec(block.index), block)


def _plan_block(
    spec: BlockSpec, options: JobOptions, packer: PackingFormat, checkpoint: Checkpoint
) -> BlockPlan:
    linears = []
    for linear in spec.linears:
        method, scheme = rule_for(options, linear.name)
        # Without data nothing tells which inputs are strong.
        keeps_outliers = scheme is not None and method == "gptq"
        num_outliers = options.outlier_columns if keeps_outliers else 0
        if scheme is not None:
            scheme = held_scheme(packer.NAME, scheme)
            packer.check(linear.name, linear.rows, linear.columns, scheme)
            _refuse_computed(linear)
            _refuse_few_columns(linear, num_outliers)
        linears.append(
            LinearPlan(
                name=linear.name,
                path=linear.path,
                experts=linear.experts,
                rows=linear.rows,
                columns=linear.columns,
                method=method if scheme is not None else None,
                scheme=scheme,
                num_outliers=num_outliers,
                num_outlier_weights=(
                    weights_per_row(linear.columns, options.outlier_weights) if keeps_outliers else 0
                ),
                corrects_bias=options.correct_biases
                and linear.has_own_bias
                and scheme is not None
                and method == "gptq"
                and linear.experts is None,
                weight=StoredPart(tensor=linear.weight_tensors[0], view=linear.weight_view),
                weight_dtype=checkpoint.tensors[linear.weight_tensors[0]].dtype,
                split_bias=None if scheme is None or linear.has_own_bias else linear.bias,
            )
        )
    quantized = {linear.name: linear for linear in linears if linear.scheme is not None}
    groups = [tuple(n for n in group if n in quantized) for group in spec.input_groups]
    groups = [group for group in groups if group]
    if options.calibration_routing == ALL_EXPERTS:
        groups = merged_groups(groups, quantized)
    return BlockPlan(
        index=spec.index,
        prefix=spec.prefix,
        tensors=tuple(spec.tensors),
        linears=tuple(linears),
        input_groups=tuple(groups),
    )


def _refuse_few_columns(linear: LinearSpec, num_outliers: int) -> None:
    if num_outliers >= linear.columns:
        raise RecipeError(
            f"outlier_columns {num_outliers} would keep all columns of {linear.name}, which has"
            f" {linear.columns}; ask for fewer, or keep this linear by a rule",
            option="outlier_columns",
            linear=linear.name,
        )


def _refuse_computed(linear: LinearSpec) -> None:
    if len(linear.weight_tensors) != 1 or (linear.weight_view is None and not linear.is_stored_as_is):
        raise UnsupportedModelError(
            f"{linear.name}: its weight is neither a stored tensor nor a part of one, but computed from"
            f" {', '.join(linear.weight_tensors[:2])}; such linears can only be kept, by a rule",
            linear=linear.name,
        )


def _refuse_other_layouts(blocks: Sequence[BlockPlan], checkpoint: Checkpoint) -> None:
    """transformers transposes some tensors when their shape asks for it, which names do not tell."""
    for linear in (linear for block in blocks for linear in block.linears if linear.scheme is not None):
        view, stored = linear.weight.view, checkpoint.tensors[linear.weight.tensor].shape
        if view is not None and tuple(stored) != view.whole:
            raise UnsupportedModelError(
                f"{linear.name}: its weight would be read from a tensor of shape {list(view.whole)}, but"
                f" {linear.weight.tensor} is stored as {list(stored)}; linears stored in a layout that"
                " transformers changes while it loads can only be kept, by a rule",
                linear=linear.name,
            )


def _plan_units(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    blocks: tuple[BlockPlan, ...],
    packer: PackingFormat,
    ends: Mapping[str, RoundedMatrix],
) -> tuple[UnitPlan, ...]:
    in_blocks = {name for block in blocks for name in block.tensors}
    prelude = set(skeleton.prelude_tensors)
    tail = sorted(set(skeleton.tail_tensors) - prelude)
    first = sorted(set(checkpoint.tensors) - in_blocks - set(tail))
    drafts: list[tuple[str, str, int | None, list[TensorSpec], list[str]]] = []
    if first:
        drafts.append(("prelude-00000", "prelude", None, [], first))
    for block in blocks:
        quantized = {linear.weight.tensor for linear in block.linears if linear.scheme is not None}
        corrected = [f"{linear.name}.bias" for linear in block.linears if linear.corrects_bias]
        split = [linear for linear in block.linears if linear.split_bias is not None]
        replaced = quantized.union(corrected, (x.split_bias.tensor for x in split if x.split_bias))
        copied = [name for name in block.tensors if name not in replaced]
        made = _packed_specs(block, packer) + [_source_spec(checkpoint, n) for n in corrected]
        made += [_bias_spec(checkpoint, linear) for linear in split]
        drafts.append((f"block-{block.index:05d}", "block", block.index, made, copied))
    if tail:
        drafts.append(("tail-00000", "tail", None, [], tail))
    units = []
    shards = shard_names(len(drafts), GGUF_ENDING if packer.NAME == gguf_format.NAME else ".safetensors")
    for shard, (name, stage, index, packed, copied) in zip(shards, drafts, strict=True):
        rounded = tuple(ends[name] for name in copied if name in ends)
        copied = [name for name in copied if name not in ends]
        specs = packed + [_source_spec(checkpoint, n) for n in copied]
        specs += map(blocks_spec, rounded)
        units.append(
            UnitPlan(
                name=name,
                stage=stage,
                block=index,
                shard=shard,
                tensors=tuple(sorted(specs, key=lambda spec: spec.name)),
                copied=tuple(copied),
                rounded=rounded,
            )
        )
    return tuple(units)


def _decoding_bytes(
    checkpoint: Checkpoint, blocks: Sequence[BlockPlan], units: Sequence[UnitPlan]
) -> dict[str, int]:
    found = {}
    for unit in units:
        names = unit.sources if unit.block is None else blocks[unit.block].tensors
        made = [checkpoint.decoded[name] for name in names if name in checkpoint.decoded]
        found[unit.name] = decoding_bytes(made)
    return {name: size for name, size in found.items() if size}


def _other_matrices(skeleton: Skeleton, checkpoint: Checkpoint) -> list[str]:
    """Modules with a matrix that are no linears to transformers and may be to engines; they stay as they are.

    Routers that multiply by a parameter, and modules that the model lacks.
    """
    specs = [skeleton.block_spec(index) for index in range(skeleton.num_blocks)]
    linears = {*skeleton.outside_linears, *skeleton.kept_linears}
    weights = {tensor for spec in specs for linear in spec.linears for tensor in linear.weight_tensors}
    names = [name for spec in specs for name in spec.tensors if name not in weights]
    return [
        name.removesuffix(".weight")
        for name in (*names, *skeleton.unused_tensors)
        if name.endswith(".weight")
        and len(checkpoint.tensors[name].shape) == 2
        and name.removesuffix(".weight") not in linears
    ]


def _source_spec(checkpoint: Checkpoint, name: str) -> TensorSpec:
    entry = checkpoint.tensors[name]
    return TensorSpec(name=name, dtype=entry.dtype, shape=tuple(entry.shape))


def _bias_spec(checkpoint: Checkpoint, linear: LinearPlan) -> TensorSpec:
    assert linear.split_bias is not None
    dtype = checkpoint.tensors[linear.split_bias.tensor].dtype
    return TensorSpec(name=f"{linear.name}.bias", dtype=dtype, shape=(linear.rows,))


def _packed_specs(block: BlockPlan, packer: PackingFormat) -> list[TensorSpec]:
    """What the packer will write."""
    specs = []
    for linear in block.linears:
        if linear.scheme is None:
            continue
        packed = packed_on_meta(
            packer,
            linear.name,
            rows=linear.rows,
            columns=linear.columns,
            scheme=linear.scheme,
            model_dtype=torch_dtype(linear.weight_dtype),
            num_outliers=linear.num_outliers,
            num_outlier_weights=linear.num_outlier_weights,
        )
        specs += [
            TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in packed.items()
        ]
    return specs


def _planned_kind(options: JobOptions, first: str | None) -> str:
    """The kind of device found here; that of the first start where this one may share its work."""
    found = device_kind(options.device or (first.partition("-")[0] if first else None))
    if first is not None and may_share(first, found, mixed_gpus=options.mixed_gpus):
        return first
    return found


def _settings_of(stored: Plan | None) -> dict[str, Any] | None:
    if stored is None:
        return None
    return {name: getattr(stored, name) for name in MACHINE_SETTINGS}


def _machine_settings(
    options: JobOptions,
    threads: int,
    checkpoint: Checkpoint,
    kind: str,
    fixed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    if fixed is not None:
        return {**fixed, "threads": options.threads_per_worker or fixed["threads"]}
    return {
        "threads": options.threads_per_worker or threads,
        "sequences_per_cell": max(1, cell_tokens(kind) // options.sequence_length),
        "sequences_per_batch": max(1, batch_tokens(kind) // options.sequence_length),
        "compute_dtype": compute_dtype(checkpoint.config, kind),
    }


def _refuse_mixed_start(kinds: Sequence[str], options: JobOptions) -> None:
    if len(kinds) > 1 and not options.mixed_gpus:
        raise PlanMismatchError(
            f"several kinds of device took part in this job so far ({', '.join(kinds)}), as mixed_gpus"
            " allowed; finish it with mixed_gpus, or choose another output to have one kind do it all",
            device_kinds=list(kinds),
        )


def _refuse_occupied(store: Store, output: str) -> None:
    present = store.list(output)
    if present:
        raise PlanMismatchError(
            f"{output} already holds something else (such as {present[0].uri});"
            " choose an empty output, or remove what is there",
            uri=present[0].uri,
        )


def _finished_report(store: Store, plan: Plan) -> dict[str, Any] | None:
    names = {info.uri for info in store.list(plan.output)}
    if join_uri(plan.output, "config.json") not in names:
        return None
    uri = join_uri(plan.output, REPORT_NAME)
    report = json.loads(store.read(uri)) if uri in names else {}
    if report.get("identity") != plan.identity():
        raise PlanMismatchError(
            f"{plan.output} already holds another finished checkpoint; choose another output, or remove it",
            uri=plan.output,
        )
    if plan.evaluation_digest is not None and report["evaluation"] is None:
        raise PlanMismatchError(
            f"{plan.output} was finished without evaluation; measure it with"
            f" quantmill evaluate {plan.output} --text {plan.options['evaluation']}",
            uri=plan.output,
        )
    if plan.evaluation_digest is not None and report["evaluation"]["digest"] != plan.evaluation_digest:
        raise PlanMismatchError(
            f"{plan.output} was finished with other evaluation text; measure it with"
            f" quantmill evaluate {plan.output} --text {plan.options['evaluation']}",
            uri=plan.output,
        )
    return report


def _difference(stored: Plan, plan: Plan) -> str:
    """The first thing in which two plans differ, in words."""
    for name in ("source", "model_type", "threads", "device_kind", "calibration_digest", "format_version"):
        before, now = getattr(stored, name), getattr(plan, name)
        if before != now:
            is_allowed = name == "device_kind" and may_share(before, now, mixed_gpus=True)
            return f"{name} was {before}, now {now}{', which mixed_gpus would allow' if is_allowed else ''}"
    if stored.source_objects != plan.source_objects or stored.config_digest != plan.config_digest:
        return "the source objects were replaced"
    if stored.versions != plan.versions:
        return f"versions were {dict(stored.versions)}, now {dict(plan.versions)}"
    first: Mapping[str, Any] = stored.options
    for name, value in json.loads(json.dumps(plan.options)).items():
        if first.get(name) != value:
            return f"{name} was {first.get(name)}, now {value}"
    return "the model's layout differs"
