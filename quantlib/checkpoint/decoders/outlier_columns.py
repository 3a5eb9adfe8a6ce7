"""Columns of linears that are kept beside their codes, in any layout; see `quantlib.packing.outlier_columns`.

R out features, C in features, K columns that are kept.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch

from quantlib.checkpoint.decoded import DecodedTensor, MakeRows
from quantlib.checkpoint.decoders.contracts import Found
from quantlib.checkpoint.header import TensorEntry
from quantlib.errors import CheckpointError
from quantlib.outlier_columns import OutlierColumns
from quantlib.packing.outlier_columns import COLUMNS, are_rising, outlier_names

_WEIGHT_DTYPES = ("BF16", "F16", "F32")


def with_outliers(found: Found, stored: Mapping[str, TensorEntry]) -> Found:
    """What a layout says of the stored tensors, and what linears keep beside their codes.

    Raises:
        CheckpointError: Tensors that belong together are not all there, or do not fit each other.
    """
    linears = [name.removesuffix(f".{COLUMNS}") for name in stored if name.endswith(f".{COLUMNS}")]
    kept = {f"{name}.weight": _with_columns(name, found.decoded, stored) for name in linears}
    return dataclasses.replace(found, decoded=found.decoded | kept) if kept else found


def _with_columns(
    name: str, decoded: Mapping[str, DecodedTensor], stored: Mapping[str, TensorEntry]
) -> DecodedTensor:
    made = decoded.get(f"{name}.weight")
    columns_name, weight_name = outlier_names(name)
    columns, weight = stored[columns_name], stored.get(weight_name)
    wanted = None if made is None else (made.shape[0], *columns.shape)
    are_named = columns.dtype == "I32" and len(columns.shape) == 1
    are_there = weight is not None and weight.shape == wanted and weight.dtype in _WEIGHT_DTYPES
    if made is None or weight is None or not (are_named and are_there):
        there = "absent" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise CheckpointError(
            f"{columns_name} is {columns.dtype} {list(columns.shape)}; wanted I32 [K] beside the codes of"
            f" {name} and a {weight_name} of as many columns, which is {there}; the checkpoint is damaged",
            linear=name,
        )
    return dataclasses.replace(
        made,
        parts={**made.parts, "outlier_columns": columns, "outlier_weight": weight},
        make_rows=partial(_make_rows, name, made.make_rows, made.shape[1]),
    )


def _make_rows(
    name: str, make_rows: MakeRows, columns: int, parts: Mapping[str, torch.Tensor], start: int, end: int
) -> torch.Tensor:
    column_K, weight_RK = parts["outlier_columns"], parts["outlier_weight"]
    if not are_rising(column_K.tolist(), columns):
        raise CheckpointError(
            f"{name}.{COLUMNS} must name columns in order, from 0 to at most {columns - 1};"
            " the checkpoint is damaged",
            linear=name,
        )
    outliers = OutlierColumns(column_K=column_K, weight_RK=weight_RK[start:end])
    return outliers.put_into_(make_rows(parts, start, end))
