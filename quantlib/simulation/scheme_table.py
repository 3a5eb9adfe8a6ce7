"""A model's weights in every scheme: how many bytes they are, and how many GPUs hold them.

From shapes alone. Codes, scales and zero points are counted without what a layout needs to fill its words;
all that is not a quantized linear is counted in 16 bits.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from quantlib.job.plan import Plan
from quantlib.job.report_figures import size
from quantlib.schemes import SCHEME_NAMES, WeightScheme, groups_said, has_own_groups, scheme_from_name
from quantlib.simulation.config_shapes import packed_bytes
from quantlib.simulation.native_products import NATIVE, native_format
from quantlib.simulation.shapes import GroupShape, ModelShape

_PLAIN_BYTES = {"FP32": 4, "FP16": 2}
_NOTES = (
    "codes with their scales and zero points; embeddings, head, norms and linears that are kept, in 16 bits",
    "GPUs hold the weights and nothing else: caches, activations and the engine come on top, and an engine"
    " may want a number that divides the heads",
    "FP16 stands for BF16 too",
    "A16, NF4, FP4: weights only; kernels turn codes into 16-bit numbers and multiply these, on any GPU",
    "what GPUs of NVIDIA multiply as it is, if activations are in that format too:",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWeights:
    """What must be in memory to serve a model.

    Attributes:
        name: For people.
        linears: Linears that schemes are for, as (rows, columns) -> how many; rows of those that read the
            same may be taken together.
        parameters: Of the whole model.
    """

    name: str
    linears: Mapping[tuple[int, int], int]
    parameters: int


def weights_of_shape(shape: ModelShape) -> ServedWeights:
    """Of a model stored in bf16, all of whose input groups are quantized."""
    groups = (group for block in shape.blocks for group in block.groups)
    linears = Counter((group.rows, group.columns) for group in groups)
    return ServedWeights(name=shape.name, linears=linears, parameters=shape.source_bytes // 2)


def weights_of_plan(plan: Plan, shapes: Iterable[tuple[int, ...]]) -> ServedWeights:
    """Of a planned checkpoint; linears that rules keep stay as they are.

    Args:
        shapes: Of all tensors of the source.
    """
    linears = (linear for block in plan.blocks for linear in block.linears if linear.scheme is not None)
    return ServedWeights(
        name=plan.source,
        linears=Counter((linear.rows, linear.columns) for linear in linears),
        parameters=sum(map(prod, shapes)),
    )


def scheme_table(
    weights: ServedWeights, gpu_bytes: int, group_size: int, names: Iterable[str] = SCHEME_NAMES
) -> dict[str, Any]:
    """All schemes side by side, as JSON values.

    Args:
        gpu_bytes: Memory of a GPU.
        group_size: Columns that share a scale, where a scheme has none of its own.

    Returns:
        ``rows``: of every scheme, after FP32 and FP16, ``bytes`` of the model, ``share`` of those in FP16,
        the least number of ``gpus`` that hold them, ``native`` format, and ``kept``: linears that stay in
        16 bits as their columns are no whole groups. ``native``: format -> generations of GPUs.
    """
    plain = {name: (weights.parameters * each, 0, None) for name, each in _PLAIN_BYTES.items()}
    coded = {name: _in_scheme(weights, _scheme(name, group_size)) for name in names}
    return {
        "model": weights.name,
        "parameters": weights.parameters,
        "gpu_memory_bytes": gpu_bytes,
        "group_size": group_size,
        "rows": [
            {
                "scheme": name,
                "bytes": found,
                "share": found / plain["FP16"][0],
                "gpus": -(-found // gpu_bytes),
                "native": native,
                "kept": kept,
            }
            for name, (found, kept, native) in (plain | coded).items()
        ],
        "native": {name: list(generations) for name, generations in NATIVE.items()},
        "notes": list(_NOTES),
    }


def format_schemes(table: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    gpu = f"GPUs of {size(table['gpu_memory_bytes'])}"
    groups = groups_said(table["group_size"]).replace("group ", "groups of ")
    width = max(len(gpu), 4)
    return "\n".join(
        (
            f"{table['model']}: {table['parameters']:,} parameters; integers in {groups}",
            f"{'scheme':<13}{'weights':>10}  {'of FP16':>7}  {gpu:>{width}}  codes",
            *(_line(row, width) for row in table["rows"]),
            *table["notes"],
            *(f"  {name}: {', '.join(generations)}" for name, generations in table["native"].items()),
        )
    )


def _line(row: Mapping[str, Any], width: int) -> str:
    kept = f"{row['kept']} linears kept, no whole groups" if row["kept"] else None
    words = ", ".join(word for word in (row["native"], kept) if word is not None)
    numbers = f"{size(row['bytes']):>10}  {row['share']:>7.1%}  {row['gpus']:>{width}}"
    return f"{row['scheme']:<13}{numbers}  {words}".rstrip()


def _scheme(name: str, group_size: int) -> WeightScheme:
    return scheme_from_name(name, None if has_own_groups(name) else group_size)


def _in_scheme(weights: ServedWeights, scheme: WeightScheme) -> tuple[int, int, str | None]:
    """Bytes of the model, linears that are kept, and what the codes are."""
    fitting = {
        shape: number
        for shape, number in weights.linears.items()
        if scheme.block_rows > 1 or shape[1] % scheme.columns_per_group(shape[1]) == 0
    }
    coded = sum(
        number * packed_bytes(GroupShape(columns=columns, tiles=(rows,)), scheme)
        for (rows, columns), number in fitting.items()
    )
    others = weights.parameters - sum(rows * columns * n for (rows, columns), n in fitting.items())
    kept = sum(weights.linears.values()) - sum(fitting.values())
    return coded + 2 * others, kept, native_format(scheme)
