"""Columns that are kept beside the codes, in a checkpoint of any layout.

Of a linear with R out features, K of whose columns are kept: ``<linear>.outlier_columns`` int32 [K], which
they are, rising; ``<linear>.outlier_weight`` [R, K] in the dtype of the model, what they mean. All else is as
the layout has it: the codes of these columns are the nearest levels of the same weights. config.json says
under ``quantization_config.outliers`` how many ``columns`` every quantized linear keeps, ``except`` for those
that are listed.

No serving engine reads these tensors. This project does, whenever it reads such a checkpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.outlier_columns import OutlierColumns
from quantlib.packing.checks import require_shape, take_tensor
from quantlib.packing.contracts import PackingFormat
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme

COLUMNS, WEIGHT = "outlier_columns", "outlier_weight"
_CONFIG_KEY = "outliers"
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def outlier_names(name: str) -> tuple[str, str]:
    """Full names of the two tensors of a linear."""
    return f"{name}.{COLUMNS}", f"{name}.{WEIGHT}"


def all_packed_names(packer: PackingFormat, name: str) -> tuple[str, ...]:
    """Full names of all tensors a quantized linear may consist of."""
    return (*packer.packed_names(name), *outlier_names(name))


def pack_linear(packer: PackingFormat, name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """All tensors to write of a linear; also on the meta device.

    Raises:
        PackingError: It does not fit the layout, or contradicts itself.
    """
    tensors = packer.pack(name, quantized)
    if quantized.outliers is None:
        return tensors
    pair = quantized.outliers.column_K, quantized.outliers.weight_RK.contiguous()
    _check(name, *pair, tuple(quantized.codes_RC.shape))
    return tensors | dict(zip(outlier_names(name), pair, strict=True))


def unpack_linear(
    packer: PackingFormat, name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme
) -> QuantizedLinear:
    """The very linear that was packed.

    Raises:
        PackingError: A tensor is missing or contradicts the others.
    """
    quantized = packer.unpack(name, tensors, scheme)
    if not any(part in tensors for part in outlier_names(name)):
        return quantized
    column_K, weight_RK = (take_tensor(tensors, part) for part in outlier_names(name))
    _check(name, column_K, weight_RK, tuple(quantized.codes_RC.shape))
    return dataclasses.replace(quantized, outliers=OutlierColumns(column_K=column_K, weight_RK=weight_RK))


def config_with_outliers(
    quantization_config: Mapping[str, Any], num_columns: int, without: Sequence[str]
) -> dict[str, Any]:
    """A ``quantization_config`` that says which linears keep columns.

    Args:
        num_columns: Of each.
        without: Quantized linears that keep none.
    """
    if not num_columns:
        return dict(quantization_config)
    return {**quantization_config, _CONFIG_KEY: {"columns": num_columns, "except": list(without)}}


def num_outlier_columns(quantization_config: Mapping[str, Any], name: str) -> int:
    """How many columns a quantized linear keeps.

    Raises:
        PackingError: The entry is not understood.

    >>> config = config_with_outliers({}, 8, ["a"])
    >>> num_outlier_columns(config, "a"), num_outlier_columns(config, "b"), num_outlier_columns({}, "b")
    (0, 8, 0)
    """
    entry = quantization_config.get(_CONFIG_KEY)
    if entry is None:
        return 0
    columns = entry.get("columns") if isinstance(entry, Mapping) else None
    if not isinstance(columns, int) or columns < 1 or not isinstance(entry.get("except"), list):
        raise PackingError(
            f"quantization_config.{_CONFIG_KEY} must hold a number of columns and a list under except, found"
            f" {entry!r}; config.json is damaged"
        )
    return 0 if name in entry["except"] else columns


def are_rising(columns: Sequence[int], end: int) -> bool:
    """Whether columns of a linear of ``end`` are named in order, each once.

    >>> are_rising([0, 5], 6), are_rising([5, 0], 6), are_rising([5, 5], 6), are_rising([6], 6)
    (True, False, False, False)
    """
    return all(a < b for a, b in zip((-1, *columns), (*columns, end), strict=True))


def _check(name: str, column_K: torch.Tensor, weight_RK: torch.Tensor, shape: tuple[int, ...]) -> None:
    columns_name, weight_name = outlier_names(name)
    require_shape(columns_name, column_K, (column_K.numel(),))
    require_shape(weight_name, weight_RK, (shape[0], column_K.numel()))
    if column_K.dtype != torch.int32 or weight_RK.dtype not in _WEIGHT_DTYPES:
        raise PackingError(
            f"{name}: columns that are kept are named in int32 and stored in bf16, fp16 or fp32, found"
            f" {column_K.dtype} and {weight_RK.dtype}",
            linear=name,
        )
    if not column_K.is_meta and not are_rising(column_K.tolist(), shape[1]):
        raise PackingError(
            f"{name}: the columns that are kept must rise from 0 to at most {shape[1] - 1}; the checkpoint is"
            " damaged",
            linear=name,
        )
