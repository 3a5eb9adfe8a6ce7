"""Where one tensor lies in the memory of another: slices, selected experts, transposed and interleaved parts.

Parameters on the meta device have addresses though no values, so that "this linear is the upper half of
expert 3 of that tensor" need not be written down family by family: it is read off the two tensors.
"""

from typing import NamedTuple

import torch

from quantlib.strided_view import StridedView

Layout = tuple[tuple[int, ...], tuple[int, ...], int]


class _Dim(NamedTuple):
    """One dimension of the whole: its stride in the storage, its length, its stride in a contiguous copy."""

    step: int
    length: int
    contiguous: int


def layout(tensor: torch.Tensor) -> Layout:
    """Size, strides and offset of a tensor in its storage; strides of dimensions of size one say nothing."""
    stride = tuple(s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (tuple(tensor.shape), stride, int(tensor.storage_offset()))


def view_within(part: torch.Tensor, whole: torch.Tensor) -> StridedView | None:
    """How ``part`` is read from a contiguous copy of ``whole``; None when it does not lie within it.

    Both are views of one storage. Elements that ``whole`` leaves out cannot be read from it.

    Examples:
        >>> experts = torch.empty(4, 6, 8, device="meta")
        >>> view_within(experts[1, 3:].T, experts)
        StridedView(whole=(4, 6, 8), size=(8, 3), stride=(1, 8), offset=72)
        >>> view_within(experts[1, 3:], experts[1, :3]) is None
        True
    """
    dims = _dims(whole)
    first = _position(dims, int(part.storage_offset()) - int(whole.storage_offset()))
    if first is None:
        return None
    stride, last = [], list(first)
    for length, step in zip(part.shape, part.stride(), strict=True):
        along = _dim_along(dims, step) if length > 1 else None
        if along is None:
            if length > 1:
                return None
            stride.append(0)
            continue
        steps = step // dims[along].step
        stride.append(steps * dims[along].contiguous)
        last[along] += steps * (length - 1)
    if any(index >= dim.length for index, dim in zip(last, dims, strict=True)):
        return None
    offset = sum(index * dim.contiguous for index, dim in zip(first, dims, strict=True))
    return StridedView(whole=tuple(whole.shape), size=tuple(part.shape), stride=tuple(stride), offset=offset)


def _dims(tensor: torch.Tensor) -> list[_Dim]:
    """Those longer than one, the widest stride first."""
    contiguous = torch.empty(tensor.shape, device="meta").stride()
    dims = map(_Dim, tensor.stride(), tensor.shape, contiguous)
    return sorted((dim for dim in dims if dim.length > 1), reverse=True)


def _position(dims: list[_Dim], offset: int) -> list[int] | None:
    """The index along each dimension of the element at an offset."""
    position = []
    for dim in dims:
        position.append(offset // dim.step)
        offset -= position[-1] * dim.step
    inside = all(0 <= index < dim.length for index, dim in zip(position, dims, strict=True))
    return position if inside and not offset else None


def _dim_along(dims: list[_Dim], step: int) -> int | None:
    """Which dimension a step goes along: the widest of which it is a multiple."""
    fitting = (n for n, dim in enumerate(dims) if step % dim.step == 0 and 0 < step // dim.step < dim.length)
    return next(fitting, None)
