"""Checks what a source's linears became: packed tensors by their kind, split biases value by value."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from quantlib.checkpoint.dtypes import dtype_name, torch_dtype
from quantlib.checkpoint.findings import limited
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source_linears import SourceLinear
from quantlib.errors import CheckpointError, PackingError
from quantlib.packing import PackingFormat, format_of
from quantlib.packing.outliers import all_packed_names, num_outlier_columns, num_outlier_weights
from quantlib.packing.specs import packed_on_meta
from quantlib.schemes import WeightScheme
from quantlib.storage import Store
from quantlib.strided_view import StoredPart


def packed_findings(
    source: Checkpoint, output: Checkpoint, packed: Mapping[str, Sequence[SourceLinear]]
) -> Iterator[str]:
    """Packed tensors that are missing, too many, or of other dtypes and shapes than they have to be.

    Args:
        source: What the output was made from.
        output: What can be read of it.
        packed: Tensors of the source that are not in the output, and the linears they hold weights of; of
            each tensor at least one is packed.
    """
    packer = format_of(output.config)
    if packer is None:
        if packed and output.config:
            yield (
                "config.json has no quantization_config that can be read, so that packed tensors cannot be"
                " checked."
            )
        return
    yield from limited(
        finding
        for tensor, linears in sorted(packed.items())
        for linear in linears
        for finding in _findings_of_linear(linear, source.tensors[tensor], output, packer)
    )


def _findings_of_linear(
    linear: SourceLinear, weight: TensorEntry, output: Checkpoint, packer: PackingFormat
) -> Iterator[str]:
    name = linear.name
    try:
        quantization = output.config["quantization_config"]
        scheme = packer.scheme_of(quantization, name)
        expected = {} if scheme is None else _expected(linear, weight, scheme, packer, quantization)
    except (CheckpointError, PackingError) as error:
        yield f"{name} is packed, but cannot be: {error}."
        return
    parts = all_packed_names(packer, name)
    if scheme is None:
        is_packed = any(part in output.tensors for part in parts)
        found = "is packed" if is_packed else f"was a part of {weight.name}, which is not kept"
        yield f"{name} {found}, but quantization_config says that it is not quantized."
        return
    # Its weight stands for it in some formats; in the others it must be gone.
    for part in dict.fromkeys((*parts, f"{name}.weight")):
        entry = output.tensors.get(part)
        kind = None if entry is None else (entry.dtype, entry.shape)
        if kind != expected.get(part):
            yield f"Tensor {part} is {_said(kind)}; {_said(expected.get(part))} was expected at {scheme}."


_Kind = tuple[str, tuple[int, ...]]


def _expected(
    linear: SourceLinear,
    weight: TensorEntry,
    scheme: WeightScheme,
    packer: PackingFormat,
    quantization: Mapping[str, Any],
) -> dict[str, _Kind]:
    if len(linear.shape) != 2:
        raise CheckpointError(f"its weight in the source has {len(linear.shape)} dims", tensor=weight.name)
    rows, columns = linear.shape
    packed = packed_on_meta(
        packer,
        linear.name,
        rows=rows,
        columns=columns,
        scheme=scheme,
        model_dtype=torch_dtype(weight.dtype),
        num_outliers=num_outlier_columns(quantization, linear.name),
        num_outlier_weights=num_outlier_weights(quantization, linear.name, columns),
    )
    return {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in packed.items()}


def split_bias_findings(
    store: Store,
    output: Checkpoint,
    source_store: Store,
    source: Checkpoint,
    split: Mapping[str, Mapping[str, StoredPart]],
) -> Iterator[str]:
    """Biases that are missing, of another dtype or shape, or not equal to their part of the source's tensor.

    Args:
        store: The store the output lies in.
        output: What can be read of it.
        source_store: The store the source lies in.
        source: What the output was made from.
        split: Tensors of the source that are not in the output -> the biases they were split into.

    Raises:
        CheckpointError: An object was replaced meanwhile.

    Cost: reads these tensors on both sides, one of the source's at a time.
    """
    for tensor, parts in sorted(split.items()):
        entry = source.tensors[tensor]
        other = next((x.view.whole for x in parts.values() if x.view and x.view.whole != entry.shape), None)
        if other is not None:
            yield f"Tensor {tensor} of the source is {list(entry.shape)}, by config.json {list(other)}."
            continue
        same = []
        for name, part in parts.items():
            found = output.tensors.get(name)
            kind = None if found is None else (found.dtype, found.shape)
            expected = (entry.dtype, entry.shape if part.view is None else part.view.size)
            if kind == expected:
                same.append(name)
            else:
                yield f"Tensor {name} is {_said(kind)}; {_said(expected)} was expected, a part of {tensor}."
        wholes = read_tensors(source_store, source, [tensor])
        for name, bias_R in read_tensors(store, output, same).items():
            wrong = _differing(bias_R, parts[name].of(wholes))
            if wrong:
                yield (
                    f"Tensor {name} is not as its part of {tensor} in the source: {wrong:,} of its"
                    f" {bias_R.numel():,} values differ."
                )


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many values do not have the same bytes."""
    one_VB, other_VB = (x.contiguous().view(-1, 1).view(torch.uint8) for x in (one, other))
    return int((one_VB != other_VB).any(dim=1).sum())


def _said(kind: _Kind | None) -> str:
    return "absent" if kind is None else f"{kind[0]} {list(kind[1])}"
