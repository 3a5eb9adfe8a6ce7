"""The one table of job options: command line, recipe file and Prefect form are all made from it.

Each field of `JobOptions` carries its help text and constraints as metadata. `options_from` is the one
validator: command line, recipe file and Prefect parameters end in it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlib.errors import RecipeError
from quantlib.job.gates import refuse_unmeasured
from quantlib.job.hook import check_hook
from quantlib.job.node_terms import labels_from, resources_from
from quantlib.job.option_table import REQUIRED, Option, check_value, declare, fields_of, names_in
from quantlib.job.rules import Rule, rule_values, rules_from
from quantlib.job.scheme_defaults import FOLLOWING, with_scheme_defaults
from quantlib.job.targets import TARGETS, default_format
from quantlib.job.text_sources import text_sources
from quantlib.schemes import (
    GGUF_GROUP_SIZE,
    SCHEME_NAMES,
    WHOLE_ROW,
    WHOLE_TENSOR,
    WeightScheme,
    has_own_groups,
    scheme_from_name,
)
from quantlib.solver_settings import COLUMN_ORDERS, FROM_EXTREMES, MOST_OUTLIER_WEIGHTS, SCALE_SEARCHES
from quantlib.units import parse_bytes

ROUTED, ALL_EXPERTS = "routed", "all-experts"
KEPT_EMBEDDINGS, ROUNDED_EMBEDDINGS = "keep", "q8_0"
PLACEMENTS = ("pack", "spread", "strict-pack", "strict-spread")

_WHAT, _HOW, _DATA = "Checkpoint", "Quantization", "Calibration and evaluation"
_PUBLICATION, _RUN = "Publication", "Execution"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """A validated request. ``None`` means: decided by the plan from the model or the machine.

    Choices that follow the scheme (`scheme_defaults`) or the target (the format) have been made by
    `options_from`; none of them is None.
    """

    source: str = declare(REQUIRED, _WHAT, "Checkpoint to convert: s3://, file:// or a path.")
    output: str = declare(REQUIRED, _WHAT, "Where the quantized checkpoint goes: s3://, file:// or a path.")
    work: str | None = declare(
        None, _WHAT, "Where records of the running job are kept; beside the output unless named."
    )
    scheme: str = declare(
        "W4A16",
        _HOW,
        "Number format, bits and symmetry of the weights, and of inputs where a name says neither A16 nor NF4"
        " or FP4.",
        choices=SCHEME_NAMES,
        in_identity=True,
    )
    group_size: int | None = declare(
        None,
        _HOW,
        "Columns that share a scale; -1 for one scale a row, 0 for one a weight. By default 128, for gguf 32;"
        " floats, codebooks and W8A8 have their own.",
        minimum=8,
        also_allowed=(WHOLE_ROW, WHOLE_TENSOR),
        in_identity=True,
    )
    method: str = declare(
        "gptq",
        _HOW,
        "gptq uses calibration text; rtn rounds to nearest and needs none.",
        choices=("gptq", "rtn"),
        in_identity=True,
    )
    format: str | None = declare(
        None,
        _HOW,
        "Layout of the output; by default the one that the target reads best, else the first that holds the"
        " scheme. Several, with commas between them, make an output each, OUTPUT/FORMAT, of codes that are"
        " solved once.",
        choices=("compressed-tensors", "gptq", "awq", "bitsandbytes", "gguf"),
        several=True,
        in_identity=True,
    )
    embeddings: str = declare(
        KEPT_EMBEDDINGS,
        _HOW,
        "What embedding and head are stored as: as in the source, or rounded to nearest in Q8_0, blocks of 32"
        " columns that gguf alone has.",
        choices=(KEPT_EMBEDDINGS, ROUNDED_EMBEDDINGS),
    )
    portable_scales: bool = declare(
        False,
        _HOW,
        "Round scales of integers to values that bf16 and fp16 hold both, so that any layout can hold the"
        " codes; always so where one run writes layouts with scales of different dtypes.",
    )
    target: str | None = declare(
        None,
        _HOW,
        "Engine that is to serve the output; what it would reject is refused before any work.",
        choices=TARGETS,
    )
    tensor_parallel: int = declare(
        1, _HOW, "Devices among which the target splits every matrix; needs a target.", minimum=1
    )
    propagation: str | None = declare(
        None,
        _HOW,
        "Which activations calibrate block k+1: those of the original or of the quantized blocks; by default"
        " of the quantized ones at 3 bits.",
        choices=("original", "quantized"),
        in_identity=True,
    )
    correct_targets: bool | None = declare(
        None,
        _HOW,
        "Fit the codes to the outputs of the original block while the activations are those of quantized"
        " blocks; needs propagation quantized; by default at 3 bits.",
        in_identity=True,
    )
    scale_search: str | None = declare(
        None,
        _HOW,
        "What a scale is searched for: to cover the extremes (minmax cuts the upper one of a symmetric group"
        " by half a step, absmax does not), for least squared error, or for least error as the calibration"
        " text weighs it; by default hessian, at 3 bits inverse-hessian.",
        choices=SCALE_SEARCHES,
        in_identity=True,
    )
    column_order: str = declare(
        "activation",
        _HOW,
        "Order in which gptq solves columns; activation takes the strongest inputs first.",
        choices=COLUMN_ORDERS,
        in_identity=True,
    )
    descent_passes: int | None = declare(
        None,
        _HOW,
        "Passes of coordinate descent after gptq; each costs one to two more solves; by default 2 below"
        " 4 bits, else 0.",
        minimum=0,
        in_identity=True,
    )
    refit_scales: bool | None = declare(
        None,
        _HOW,
        "Fit scales to the codes by least squares after gptq; by default below 4 bits.",
        in_identity=True,
    )
    outlier_columns: int = declare(
        0,
        _HOW,
        "Columns of every linear of gptq, those with the strongest inputs, that are kept in 16 bits beside"
        " the codes; no serving engine reads them.",
        minimum=0,
        in_identity=True,
    )
    outlier_weights: int = declare(
        0,
        _HOW,
        "Single weights out of a thousand of every linear of gptq, those whose rounding costs most, that are"
        " kept in 16 bits beside the codes; no serving engine reads them.",
        minimum=0,
        maximum=MOST_OUTLIER_WEIGHTS,
        in_identity=True,
    )
    tf32_feedback: bool = declare(
        False,
        _HOW,
        "Let a GPU round to TF32 what carries errors to columns solved later: faster for wide linears, a few"
        " codes are others; a CPU has no TF32.",
        in_identity=True,
    )
    correct_biases: bool = declare(
        False,
        _HOW,
        "Let the biases that linears have make up for what gptq does to their mean output.",
        in_identity=True,
    )
    calibration_routing: str = declare(
        "routed",
        _HOW,
        "Which tokens an expert is calibrated with: those the router sends it, or all.",
        choices=(ROUTED, ALL_EXPERTS),
        in_identity=True,
    )
    expert_shrinkage: int = declare(
        100,
        _HOW,
        "How much the tokens of all experts count beside those that an expert was routed: as many as this"
        " percentage of its input features; 0 for not at all.",
        minimum=0,
        in_identity=True,
    )
    rules: tuple[Mapping[str, Any], ...] = declare(
        (),
        _HOW,
        "Ordered exceptions by linear name, the first match decides: match, and scheme, group_size, method"
        " or keep.",
        in_identity=True,
    )
    calibration: str | None = declare(
        None,
        _DATA,
        "Calibration text or chat: a parquet, jsonl or txt object, or a folder of them; of several, each with"
        " its weight: a.jsonl=0.7, b.parquet=0.3.",
    )
    evaluation: str | None = declare(
        None, _DATA, "Held-out text; with it the run reports perplexity and KL divergence."
    )
    text_column: str | None = declare(
        None,
        _DATA,
        "Column of the text, or of chat messages, in parquet and jsonl; by default text, or messages where"
        " there is no text.",
    )
    sequences: int = declare(256, _DATA, "Calibration sequences.", minimum=1)
    sequence_length: int = declare(2048, _DATA, "Tokens in a sequence.", minimum=8)
    evaluation_sequences: int = declare(32, _DATA, "Evaluation sequences.", minimum=1)
    seed: int = declare(
        0,
        _DATA,
        "0 takes the calibration documents as they come; another number shuffles them.",
        minimum=0,
    )
    max_perplexity_ratio: float | None = declare(
        None,
        _PUBLICATION,
        "Publish only if perplexity on the held-out text is at most so many times the original's, as 1.1.",
        minimum=0,
    )
    max_kl: float | None = declare(
        None,
        _PUBLICATION,
        "Publish only if the KL divergence on the held-out text is at most this, in nats a token.",
        minimum=0,
    )
    max_fallback_share: float | None = declare(
        None,
        _PUBLICATION,
        "Publish only if at most this share of the quantized linears needed a fallback, as 0.01.",
        minimum=0,
        maximum=1,
    )
    max_block_error: float | None = declare(
        None,
        _PUBLICATION,
        "Publish only if no block's output on the held-out text has a larger relative error than this.",
        minimum=0,
    )
    publish: str = declare(
        "when-passed",
        _PUBLICATION,
        "when-passed publishes an output that keeps its gates and whose hook agrees; staged leaves it where"
        " no reader takes it for a checkpoint, for quantmill publish.",
        choices=("when-passed", "staged"),
    )
    hook: str | None = declare(
        None,
        _PUBLICATION,
        "Command that must end with 0 before an output is published, or @NAME of one that the operator wrote"
        " down; {model}, {output} and {report} in it stand for a local folder that loads as a checkpoint, the"
        " address, and the report as a local file.",
    )
    hook_timeout: int = declare(3600, _PUBLICATION, "Seconds that the hook may take.", minimum=1)
    runner: str = declare(
        "ray",
        _RUN,
        "ray spreads the work over workers; inprocess does it here.",
        choices=("ray", "inprocess"),
    )
    workers: int | None = declare(
        None, _RUN, "Workers; by default one for each GPU, or up to four on CPU cores.", minimum=1
    )
    threads_per_worker: int | None = declare(
        None, _RUN, "CPU threads of a worker; by default an equal share.", minimum=1
    )
    worker_memory: str | None = declare(
        None,
        _RUN,
        "Memory that a worker's process may take, such as 24GB; less is done at a time until it fits; by"
        " default what its machine has.",
    )
    device_memory: str | None = declare(
        None, _RUN, "Memory that a worker may take of its GPU, such as 70GB; by default what it has."
    )
    object_store_memory: str | None = declare(
        None, _RUN, "Memory of Ray's object store on a node, such as 8GB; by default Ray's choice."
    )
    device: str | None = declare(
        None,
        _RUN,
        "Kind of device; by default cuda where there is one.",
        choices=("cpu", "cuda"),
    )
    gpu_model: str | None = declare(
        None,
        _RUN,
        "Model of GPU that workers take, as Ray names it (H100); to be chosen where nodes have several.",
    )
    mixed_gpus: bool = declare(
        False,
        _RUN,
        "Let GPUs of several models share a job; its bytes then depend on which of them did what.",
    )
    worker_resources: str | None = declare(
        None, _RUN, "Custom resources of Ray that a worker takes of its node: quant=1,slots=0.5."
    )
    worker_labels: str | None = declare(
        None, _RUN, "Labels of Ray that a worker's node must have: pool=a,market=!spot,zone=in(a,b)."
    )
    placement: str | None = declare(
        None,
        _RUN,
        "Reserve places for the first workers together, all or none: on few nodes, on many, on one, or on a"
        " node for each; by default each is placed as soon as there is room.",
        choices=PLACEMENTS,
    )
    ray_address: str | None = declare(
        None, _RUN, "Address of a running Ray cluster; without it a small one is started here."
    )
    storage_engine: str = declare("obstore", _RUN, "Client library for S3.", choices=("obstore", "s3fs"))
    checkpoint_every: int | None = declare(
        None,
        _RUN,
        "Blocks between checkpoints of the activations; 0 keeps none; by default as often as they are cheap.",
        minimum=1,
        also_allowed=(0,),
    )
    replay: str | None = declare(
        None, _RUN, "Provenance file of an earlier run that is to be repeated: s3://, file:// or a path."
    )


def option_fields() -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """Name -> (dataclass field, its Option), in the order in which help texts show them."""
    return fields_of(JobOptions)


def options_from(values: Mapping[str, Any]) -> JobOptions:
    """Validate plain values (from any front end) into a request.

    Raises:
        RecipeError: An unknown key, a missing one, a value out of its range, a wrong rule, gptq without
            calibration text, a mix without weights, devices without a target, a gate on what is not
            measured, a hook that is none, or nodes that cannot be; names the option, the value and what is
            allowed.

    >>> options_from({"source": "m", "output": "q", "method": "rtn", "group_size": 64}).group_size
    64
    """
    known = option_fields()
    refuse_unknown(values)
    for name, (found, _) in known.items():
        if found.default is REQUIRED and values.get(name) is None:
            raise RecipeError(f"{name} is required: give the address of the {name}", option=name)
    for name, value in values.items():
        check_value(name, value, known[name][0])
    rules = rules_from(values.get("rules", ()))
    options = JobOptions(**{**values, "rules": tuple(rule_values(rule) for rule in rules)})
    layout = options.format or default_format(options.target, options.scheme)
    options = dataclasses.replace(options, format=layout)
    options = dataclasses.replace(
        options,
        group_size=_scheme(options).group_size,
        **_following(options, {name: getattr(options, name) for name in FOLLOWING}),
    )
    _refuse_missing_calibration(options, rules)
    refuse_unmeasured(dataclasses.asdict(options))
    if options.hook is not None:
        check_hook(options.hook)
    _refuse_idle_searches(options)
    if options.calibration is not None:
        text_sources(options.calibration)
    for name in ("worker_memory", "device_memory", "object_store_memory"):
        if getattr(options, name) is not None:
            parse_bytes(getattr(options, name), name)
    _refuse_impossible_nodes(options)
    if options.tensor_parallel > 1 and options.target is None:
        raise RecipeError(
            f"tensor_parallel {options.tensor_parallel} is about how an engine splits the output, and no"
            f" target is named; name one of {', '.join(TARGETS)}, or leave it out",
            option="tensor_parallel",
        )
    _refuse_rounded_embeddings(options)
    _refuse_both_outliers(options)
    for name in ("outlier_columns", "outlier_weights"):
        if getattr(options, name):
            _refuse_unused_outliers(options, rules, name)
    if options.correct_targets and options.propagation != "quantized":
        raise RecipeError(
            f"correct_targets needs propagation quantized, found {options.propagation}: with the original"
            " activations there is nothing to correct",
            option="correct_targets",
        )
    return options


def default_of(options: JobOptions, name: str) -> Any:
    """What an option is where nobody names it, beside the other values of a validated request."""
    if name in FOLLOWING:
        return _following(options, dict.fromkeys(FOLLOWING))[name]
    if name == "group_size":
        return _scheme(dataclasses.replace(options, group_size=None)).group_size
    if name == "format":
        return default_format(options.target, options.scheme)
    return option_fields()[name][0].default


def groups_of_layout(layout: str) -> int | None:
    """The group size of integers where nobody names one; None for that of the scheme.

    Args:
        layout: As in `JobOptions.format`; of several one may decide.

    >>> groups_of_layout("gguf"), groups_of_layout("gptq")
    (32, None)
    """
    return GGUF_GROUP_SIZE if "gguf" in names_in(layout) else None


def _following(options: JobOptions, choices: Mapping[str, Any]) -> dict[str, Any]:
    scheme = _scheme(options)
    return with_scheme_defaults(
        choices,
        bits=scheme.bits,
        uses_data=options.method == "gptq",
        has_given_scales=scheme.has_given_scales,
    )


def _scheme(options: JobOptions) -> WeightScheme:
    group_size = options.group_size
    if group_size is None and not has_own_groups(options.scheme):
        group_size = groups_of_layout(options.format or "")
    return scheme_from_name(options.scheme, group_size)


def refuse_unknown(values: Mapping[str, Any]) -> None:
    """Refuse keys that are no options.

    Raises:
        RecipeError: Names the first unknown key and the options.
    """
    known = option_fields()
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RecipeError(
            f"unknown option {unknown[0]!r}; the options are {', '.join(known)}", option=unknown[0]
        )


def _refuse_missing_calibration(options: JobOptions, rules: Sequence[Rule]) -> None:
    methods = {options.method, *(rule.method for rule in rules)}
    if "gptq" in methods and options.calibration is None:
        raise RecipeError(
            "method gptq needs calibration text and none was given; name it with calibration,"
            " or use method rtn",
            option="calibration",
        )


def _refuse_rounded_embeddings(options: JobOptions) -> None:
    others = [name for name in names_in(options.format or "") if name != "gguf"]
    if options.embeddings != KEPT_EMBEDDINGS and others:
        raise RecipeError(
            f"embeddings {options.embeddings} is a kind of block that gguf has, and format names {others[0]};"
            " use --format gguf by itself, or leave it out",
            option="embeddings",
        )


def _refuse_both_outliers(options: JobOptions) -> None:
    if options.outlier_columns and options.outlier_weights:
        raise RecipeError(
            f"outlier_columns {options.outlier_columns} and outlier_weights {options.outlier_weights} are two"
            " forms of the same, and a linear has one; leave one of them out",
            option="outlier_weights",
        )


def _refuse_unused_outliers(options: JobOptions, rules: Sequence[Rule], name: str) -> None:
    asked = f"{name} {getattr(options, name)}"
    if "gptq" not in {options.method, *(rule.method for rule in rules)}:
        raise RecipeError(
            f"{asked} needs method gptq, found {options.method}: what rounding costs is known from"
            " calibration text alone",
            option=name,
        )
    if "gguf" in names_in(options.format or ""):
        raise RecipeError(
            f"{asked} adds tensors for which gguf files have no names; use another format, or leave it out",
            option=name,
        )
    if options.target is not None:
        raise RecipeError(
            f"{asked} adds tensors that no serving engine reads, and target"
            f" names {options.target}; leave one of them out",
            option=name,
        )


def _refuse_idle_searches(options: JobOptions) -> None:
    if not _scheme(options).has_given_scales:
        return
    wanted = {"scale_search": FROM_EXTREMES, "refit_scales": (False,)}
    for name, allowed in wanted.items():
        if getattr(options, name) not in allowed:
            raise RecipeError(
                f"{name} {getattr(options, name)} cannot be: scales of scheme {options.scheme} with"
                f" group_size {options.group_size} follow from the whole weight; leave it out, or choose"
                " another scheme",
                option=name,
            )


def _refuse_impossible_nodes(options: JobOptions) -> None:
    resources_from(options.worker_resources)
    labels_from(options.worker_labels, options.gpu_model)
    if options.gpu_model is not None and options.device == "cpu":
        raise RecipeError(
            f"gpu_model {options.gpu_model} and device cpu exclude each other; leave one of them out",
            option="gpu_model",
        )
