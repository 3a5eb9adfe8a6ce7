"""The plan of a job over one random block, and its token rows: what a planner makes from a checkpoint.

B sequences, T positions.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from block_models import BlockModel

from quantlib.job.options import JobOptions, options_from
from quantlib.job.plan import BlockPlan, LinearPlan, Plan
from quantlib.machine import batch_tokens, cell_tokens, compute_dtype, device_kind
from quantlib.model.skeleton import BlockSpec, Skeleton
from quantlib.schemes import scheme_from_name
from quantlib.solver_settings import SolverSettings
from quantlib.strided_view import StoredPart

DIGEST = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRequest:
    """What is measured.

    Attributes:
        model: Which block.
        device: ``cuda`` or ``cpu``.
        sequences: Calibration sequences.
        sequence_length: Tokens of each.
        scheme: Of all linears but the router.
        group_size: Of the scheme.
        propagation: ``original`` or ``quantized``: then all tokens pass the packed block too.
        passes: In how many forwards the sums are gathered, a part of the input groups in each.
        height: Most rows of a tile; None for the product's choice.
        options: Others of the job, by name.
    """

    model: BlockModel
    device: str
    sequences: int
    sequence_length: int = 2048
    scheme: str = "W4A16"
    group_size: int = 128
    propagation: str = "original"
    passes: int = 1
    height: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """In all."""
        return self.sequences * self.sequence_length


def block_plan(request: BlockRequest, skeleton: Skeleton, folder: str) -> Plan:
    """The plan, as it would be made of a checkpoint with just this block.

    Args:
        folder: Stands for all addresses; token rows are to be there.
    """
    options = _options(request, folder)
    kind, config = device_kind(request.device), request.model.config
    return Plan(
        source=folder,
        source_format="safetensors",
        source_objects={},
        output=folder,
        work=folder,
        options=dataclasses.asdict(options),
        config_digest="",
        model_type=skeleton.model_type,
        blocks=(_planned(skeleton.block_spec(0), options),),
        units=(),
        kept_linears=(),
        tail_tensors=skeleton.tail_tensors,
        prelude_tensors=skeleton.prelude_tensors,
        dropped={},
        accounts=(),
        side_files=(),
        compute_dtype=compute_dtype(config, kind),
        device_kind=kind,
        threads=torch.get_num_threads(),
        sequences_per_cell=max(1, cell_tokens(kind) // request.sequence_length),
        sequences_per_batch=max(1, batch_tokens(kind) // request.sequence_length),
        calibration_digest=DIGEST,
        evaluation_digest=None,
        calibration_texts=(),
        evaluation_texts=(),
        experts_per_token=config.get("num_experts_per_tok", 0),
        versions={},
        format_version="",
    )


def token_rows(request: BlockRequest) -> torch.Tensor:
    """Random token ids, int32 [B, T]."""
    shape = (request.sequences, request.sequence_length)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(request.model.config["vocab_size"], shape, generator=generator).int()


def settings_with(options: Mapping[str, Any]) -> SolverSettings:
    """Of a solver by itself, with some options of a job."""
    addresses = dict.fromkeys(("source", "output", "calibration"), "/")
    return SolverSettings.from_options(dataclasses.asdict(options_from({**addresses, **options})))


def _options(request: BlockRequest, folder: str) -> JobOptions:
    return options_from(
        {
            "source": folder,
            "output": folder,
            "calibration": folder,
            "scheme": request.scheme,
            "group_size": request.group_size,
            "sequences": request.sequences,
            "sequence_length": request.sequence_length,
            "propagation": request.propagation,
            "device": request.device,
            **request.options,
        }
    )


def _planned(spec: BlockSpec, options: JobOptions) -> BlockPlan:
    scheme = scheme_from_name(options.scheme, options.group_size)
    linears = tuple(
        LinearPlan(
            name=linear.name,
            path=linear.path,
            experts=linear.experts,
            rows=linear.rows,
            columns=linear.columns,
            method="gptq",
            scheme=scheme,
            corrects_bias=False,
            weight=StoredPart(tensor=linear.weight_tensors[0], view=linear.weight_view),
            weight_dtype="BF16",
        )
        for linear in spec.linears
    )
    return BlockPlan(
        index=spec.index,
        prefix=spec.prefix,
        tensors=spec.tensors,
        linears=linears,
        input_groups=spec.input_groups,
    )
