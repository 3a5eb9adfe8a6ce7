"""Where a part of a tensor lies in the whole, against torch's own views of a tensor of numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.model.strided import view_within


@st.composite
def _steps(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kinds = st.sampled_from(["select", "first_half", "second_half", "even", "odd", "transpose"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 2), st.integers(0, 2)), max_size=4))


def _apply(tensor: torch.Tensor, steps: list[tuple[str, int, int]]) -> torch.Tensor:
    for kind, dim, other in steps:
        dim, other = dim % tensor.ndim, other % tensor.ndim
        middle = tensor.shape[dim] // 2
        whole = torch.arange(tensor.shape[dim])
        if kind == "transpose":
            tensor = tensor.transpose(dim, other)
        elif kind == "select" and tensor.ndim > 1:
            tensor = tensor.select(dim, whole[-1].item())
        elif kind in ("first_half", "second_half") and middle:
            start = 0 if kind == "first_half" else middle
            tensor = tensor.narrow(dim, start, middle)
        elif kind in ("even", "odd") and middle:
            picked = [slice(None)] * tensor.ndim
            picked[dim] = slice(0 if kind == "even" else 1, None, 2)
            tensor = tensor[tuple(picked)]
    return tensor


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    whole_steps=_steps(),
    part_steps=_steps(),
)
def test_view_within_reads_the_same_numbers_from_a_copy_of_the_whole(shape, whole_steps, part_steps):
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    whole = _apply(numbers, whole_steps)
    part = _apply(whole, part_steps)
    view = view_within(part, whole)
    assert view is not None
    assert torch.equal(view.of(whole.clone(memory_format=torch.contiguous_format)), part)


@given(shape=st.tuples(*[st.integers(2, 6)] * 3), whole_steps=_steps(), other_steps=_steps())
def test_view_within_is_none_unless_every_element_is_in_the_whole(shape, whole_steps, other_steps):
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    whole, other = _apply(numbers, whole_steps), _apply(numbers, other_steps)
    view = view_within(other, whole)
    has_all = set(other.flatten().tolist()) <= set(whole.flatten().tolist())
    if not has_all:
        assert view is None
    if view is not None:
        assert torch.equal(view.of(whole.clone(memory_format=torch.contiguous_format)), other)
