"""Parts of stored tensors, as plain data: what a plan says of weights that are not tensors of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StridedView:
    """A part of a contiguous tensor; all numbers in elements.

    Attributes:
        whole: The shape of that tensor.
        size: The shape of the part.
        stride: Its strides.
        offset: Of its first element.
    """

    whole: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Any) -> Any:
        """The part of a tensor of shape ``whole``; shares its memory."""
        return tensor.contiguous().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """Where a weight or a bias is read from.

    Attributes:
        tensor: Checkpoint name.
        view: The part of it, or its transpose; None when it is all of it as it is.
    """

    tensor: str
    view: StridedView | None = None

    def of(self, tensors: Mapping[str, Any]) -> Any:
        """Read from checkpoint tensors, by name; shares their memory."""
        found = tensors[self.tensor]
        return found if self.view is None else self.view.of(found)
