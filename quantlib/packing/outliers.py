"""Linears with what they keep beside their codes, in a checkpoint of any layout.

Whole columns are `outlier_columns`, single weights `outlier_weights`; a linear keeps one or the other, and
either has a tensor for what is kept and one that says where.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.outlier_columns import OutlierColumns
from quantlib.outliers import Outliers
from quantlib.packing.checks import take_tensor
from quantlib.packing.contracts import PackingFormat
from quantlib.packing.outlier_columns import COLUMNS, WEIGHT, columns_of_tensors, tensors_of_columns
from quantlib.packing.outlier_weights import INDEX, tensors_of_weights, weights_of_tensors
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import weights_per_row

_CONFIG_KEY, _COLUMNS, _PER_MILLE, _EXCEPT = "outliers", "columns", "weights_per_mille", "except"


def all_packed_names(packer: PackingFormat, name: str) -> tuple[str, ...]:
    """Full names of all tensors a quantized linear may consist of."""
    return (*packer.packed_names(name), *_outlier_names(name))


def pack_linear(packer: PackingFormat, name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """All tensors to write of a linear; also on the meta device.

    Raises:
        PackingError: It does not fit the layout, or contradicts itself.
    """
    tensors, outliers = packer.pack(name, quantized), quantized.outliers
    if outliers is None:
        return tensors
    shape = tuple(quantized.codes_RC.shape)
    if isinstance(outliers, OutlierColumns):
        return tensors | tensors_of_columns(name, outliers, shape)
    return tensors | tensors_of_weights(name, outliers, shape)


def unpack_linear(
    packer: PackingFormat, name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme
) -> QuantizedLinear:
    """The very linear that was packed.

    Raises:
        PackingError: A tensor is missing or contradicts the others.
    """
    quantized = packer.unpack(name, tensors, scheme)
    if not any(part in tensors for part in _outlier_names(name)):
        return quantized
    return dataclasses.replace(quantized, outliers=_unpacked(name, tensors, tuple(quantized.codes_RC.shape)))


def config_with_outliers(
    quantization_config: Mapping[str, Any],
    *,
    num_columns: int = 0,
    weights_per_mille: int = 0,
    without: Sequence[str],
) -> dict[str, Any]:
    """A ``quantization_config`` that says which linears keep columns or single weights.

    Args:
        num_columns: Of each.
        weights_per_mille: Of each row.
        without: Quantized linears that keep none.
    """
    kept = {_COLUMNS: num_columns} if num_columns else {_PER_MILLE: weights_per_mille}
    if not any(kept.values()):
        return dict(quantization_config)
    return {**quantization_config, _CONFIG_KEY: {**kept, _EXCEPT: list(without)}}


def num_outlier_columns(quantization_config: Mapping[str, Any], name: str) -> int:
    """How many columns a quantized linear keeps.

    Raises:
        PackingError: The entry is not understood.

    >>> config = config_with_outliers({}, num_columns=8, without=["a"])
    >>> num_outlier_columns(config, "a"), num_outlier_columns(config, "b"), num_outlier_columns({}, "b")
    (0, 8, 0)
    """
    return _stated(quantization_config, name).get(_COLUMNS, 0)


def num_outlier_weights(quantization_config: Mapping[str, Any], name: str, columns: int) -> int:
    """How many single weights a quantized linear of so many columns keeps of each row.

    Raises:
        PackingError: The entry is not understood.

    >>> config = config_with_outliers({}, weights_per_mille=5, without=["a"])
    >>> [num_outlier_weights(config, name, 4096) for name in "ab"]
    [0, 20]
    """
    return weights_per_row(columns, _stated(quantization_config, name).get(_PER_MILLE, 0))


def _stated(quantization_config: Mapping[str, Any], name: str) -> Mapping[str, int]:
    """What every linear keeps, and nothing of those that are excepted."""
    entry = quantization_config.get(_CONFIG_KEY)
    if entry is None:
        return {}
    stated = entry if isinstance(entry, Mapping) else {}
    kept = {key: stated[key] for key in (_COLUMNS, _PER_MILLE) if key in stated}
    are_numbers = all(isinstance(value, int) and value >= 1 for value in kept.values())
    if len(kept) != 1 or not are_numbers or not isinstance(stated.get(_EXCEPT), list):
        raise PackingError(
            f"quantization_config.{_CONFIG_KEY} must hold a number of {_COLUMNS} or {_PER_MILLE} and a list"
            f" under {_EXCEPT}, found {entry!r}; config.json is damaged"
        )
    return {} if name in stated[_EXCEPT] else kept


def _outlier_names(name: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for part in (COLUMNS, INDEX, WEIGHT))


def _unpacked(name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> Outliers:
    if f"{name}.{INDEX}" in tensors and f"{name}.{COLUMNS}" in tensors:
        raise PackingError(
            f"{name} has both {COLUMNS} and {INDEX}; a linear keeps columns or single weights, so that the"
            " checkpoint is damaged",
            linear=name,
        )
    weight = take_tensor(tensors, f"{name}.{WEIGHT}")
    if weight.is_floating_point() and not bool(weight.isfinite().all()):
        raise PackingError(
            f"tensor {name}.{WEIGHT} must be finite, found NaN or infinity; the checkpoint is damaged",
            tensor=f"{name}.{WEIGHT}",
        )
    if f"{name}.{INDEX}" in tensors:
        return weights_of_tensors(name, tensors[f"{name}.{INDEX}"], weight, shape)
    return columns_of_tensors(name, take_tensor(tensors, f"{name}.{COLUMNS}"), weight, shape)
