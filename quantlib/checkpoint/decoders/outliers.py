"""What linears keep beside their codes, in any layout; see `quantlib.packing.outliers`.

R out features, C in features, K columns that are kept, or M single weights of every row.
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
from quantlib.outlier_weights import OutlierWeights
from quantlib.outliers import Outliers
from quantlib.packing.outlier_columns import COLUMNS, WEIGHT, are_rising
from quantlib.packing.outlier_weights import INDEX, are_rising_rows

_WEIGHT_DTYPES = ("BF16", "F16", "F32")
# Dtype and shape of the tensor that says where, in words.
_WANTED = {COLUMNS: "I32 [K]", INDEX: "U16 [rows, M]"}


def with_outliers(found: Found, stored: Mapping[str, TensorEntry]) -> Found:
    """What a layout says of the stored tensors, and what linears keep beside their codes.

    Raises:
        CheckpointError: Tensors that belong together are not all there, or do not fit each other.
    """
    kept: dict[str, DecodedTensor] = {}
    for where in _WANTED:
        for tensor in stored:
            if tensor.endswith(f".{where}"):
                name = tensor.removesuffix(f".{where}")
                _refuse_both(name, stored)
                kept[f"{name}.weight"] = _with_kept(name, where, found.decoded, stored)
    return dataclasses.replace(found, decoded=found.decoded | kept) if kept else found


def _refuse_both(name: str, stored: Mapping[str, TensorEntry]) -> None:
    if all(f"{name}.{where}" in stored for where in _WANTED):
        raise CheckpointError(
            f"{name} has both {COLUMNS} and {INDEX}; a linear keeps columns or single weights, so that the"
            " checkpoint is damaged",
            linear=name,
        )


def _with_kept(
    name: str, where: str, decoded: Mapping[str, DecodedTensor], stored: Mapping[str, TensorEntry]
) -> DecodedTensor:
    made = decoded.get(f"{name}.weight")
    places, weight = stored[f"{name}.{where}"], stored.get(f"{name}.{WEIGHT}")
    if made is None or weight is None or not _fit(places, weight, where, made.shape[0]):
        there = "absent" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise CheckpointError(
            f"{name}.{where} is {places.dtype} {list(places.shape)}; wanted {_WANTED[where]} beside the codes"
            f" of {name} and a {name}.{WEIGHT} of as many columns, which is {there}; the"
            " checkpoint is damaged",
            linear=name,
        )
    return dataclasses.replace(
        made,
        parts={**made.parts, where: places, WEIGHT: weight},
        make_rows=partial(_make_rows, name, made.make_rows, made.shape[1]),
    )


def _fit(places: TensorEntry, weight: TensorEntry, where: str, rows: int) -> bool:
    if where == COLUMNS:
        are_named = places.dtype == "I32" and len(places.shape) == 1
    else:
        are_named = places.dtype == "U16" and len(places.shape) == 2 and places.shape[0] == rows
    wanted = (rows, places.shape[-1] if places.shape else 0)
    return are_named and weight.shape == wanted and weight.dtype in _WEIGHT_DTYPES


def _make_rows(
    name: str, make_rows: MakeRows, columns: int, parts: Mapping[str, torch.Tensor], start: int, end: int
) -> torch.Tensor:
    weight_rK = parts[WEIGHT][start:end]
    if not bool(weight_rK.isfinite().all()):
        raise CheckpointError(
            f"{name}.{WEIGHT} must be finite, found NaN or infinity; the checkpoint is damaged", linear=name
        )
    return _outliers(name, columns, parts, weight_rK, start, end).put_into_(make_rows(parts, start, end))


def _outliers(
    name: str,
    columns: int,
    parts: Mapping[str, torch.Tensor],
    weight_rK: torch.Tensor,
    start: int,
    end: int,
) -> Outliers:
    if COLUMNS in parts:
        column_K = parts[COLUMNS]
        if not are_rising(column_K.tolist(), columns):
            raise _not_in_order(f"{name}.{COLUMNS} must name columns", name, columns)
        return OutlierColumns(column_K=column_K, weight_RK=weight_rK)
    column_rM = parts[INDEX][start:end].int()
    if not are_rising_rows(column_rM, columns):
        raise _not_in_order(f"{name}.{INDEX} must name the columns of every row", name, columns)
    return OutlierWeights(column_RM=column_rM, weight_RM=weight_rK)


def _not_in_order(wanted: str, name: str, columns: int) -> CheckpointError:
    return CheckpointError(
        f"{wanted} in order, from 0 to at most {columns - 1}; the checkpoint is damaged", linear=name
    )
