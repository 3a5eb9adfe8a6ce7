"""What the linears of a block read while it runs: one gram matrix for each input group.

N tokens, C columns, B sequences of a batch, T positions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from quantlib.calibration.partials import Partial


@dataclass(slots=True)
class InputStatistics:
    """Partial statistics of one cell, which grow batch by batch.

    Attributes:
        grams: Group -> X^T X, with sums for groups that are to be centered.
        crosses: Group -> X_ref^T X, likewise, where there is a reference.
        bad_rows: Sequences of the cell in which some group saw a NaN or an infinity. When there are any,
            the grams are worthless and the cell is to be run again without these rows.
    """

    grams: dict[int, Partial] = field(default_factory=dict)
    crosses: dict[int, Partial] = field(default_factory=dict)
    bad_rows: set[int] = field(default_factory=set)


class _InputWatch:
    """Sees what a block's groups read, from now until the ``with`` block is left."""

    def __init__(self, block: nn.Module, leaders: Sequence[str]) -> None:
        self._hooks = [
            block.get_submodule(name).register_forward_pre_hook(self._hook_for(group))
            for group, name in enumerate(leaders)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, group: int, x: torch.Tensor) -> None:
        raise NotImplementedError

    def _hook_for(self, group: int):  # noqa: ANN202 - the type is torch's own
        def see(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._see(group, arguments[0])

        return see


class InputObserver(_InputWatch):
    """Watches the inputs of a block's groups while a batch runs.

    Args:
        block: The live block.
        leaders: One linear a group, named relative to the block; all of a group read the same tensor.
        statistics: Of the cell; what is seen is added to them.
        rows: Sequences of the cell that are in the batch.
        left_out: Sequences that are not to be counted.
        summed: Groups whose products are wanted; the others are only looked through for bad rows.
        references: For each group what it read in the reference stream, [B, T, C].
        centered: Groups whose sums are wanted beside their products.
    """

    def __init__(
        self,
        block: nn.Module,
        leaders: Sequence[str],
        statistics: InputStatistics,
        *,
        rows: range,
        left_out: Collection[int],
        summed: Collection[int],
        references: Sequence[torch.Tensor] = (),
        centered: Collection[int] = (),
    ) -> None:
        self._statistics, self._summed, self._centered = statistics, summed, centered
        self._rows, self._references = rows, references
        self._kept = [row for row in rows if row not in left_out]
        super().__init__(block, leaders)

    def _see(self, group: int, x: torch.Tensor) -> None:
        x_BTC = self._counted(x)
        reference_BTC = self._counted(self._references[group]) if self._references else None
        if reference_BTC is not None:
            self._look_through(reference_BTC)
        if group not in self._summed:
            # Of finite values the sum may overflow too, but then no row is to blame.
            if not torch.isfinite(x_BTC.sum(dtype=torch.float32)):
                self._look_through(x_BTC)
            return
        x_NC = x_BTC.flatten(0, 1)
        gram = self._partial(self._statistics.grams, group, x_NC, is_whole=False)
        gram.add_(x_NC)
        # A non-finite input shows in the sum of squares of its column: no second pass over the tokens.
        if not torch.isfinite(gram.diagonal).all():
            self._look_through(x_BTC)
        if reference_BTC is not None:
            cross = self._partial(self._statistics.crosses, group, x_NC, is_whole=True)
            cross.add_(x_NC, reference_BTC.flatten(0, 1))

    def _partial(
        self, partials: dict[int, Partial], group: int, x_NC: torch.Tensor, *, is_whole: bool
    ) -> Partial:
        if group not in partials:
            partials[group] = Partial(
                x_NC.shape[1], is_whole=is_whole, has_sums=group in self._centered, device=x_NC.device
            )
        return partials[group]

    def _look_through(self, x_BTC: torch.Tensor) -> None:
        finite = torch.isfinite(x_BTC).flatten(1).all(dim=1).tolist()
        kept = zip(self._kept, finite, strict=True)
        self._statistics.bad_rows |= {row for row, is_finite in kept if not is_finite}

    def _counted(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] without the sequences that are left out."""
        x_BTC = x.reshape(len(self._rows), -1, x.shape[-1])
        if len(self._kept) == len(self._rows):
            return x_BTC
        return x_BTC[torch.tensor([row - self._rows.start for row in self._kept], device=x.device).long()]


class InputRecorder(_InputWatch):
    """Keeps the inputs of a block's groups during one forward pass.

    Attributes:
        inputs: What each group's leader read.
    """

    def __init__(self, block: nn.Module, leaders: Sequence[str]) -> None:
        self.inputs: list[torch.Tensor] = [torch.empty(0)] * len(leaders)
        super().__init__(block, leaders)

    def _see(self, group: int, x: torch.Tensor) -> None:
        self.inputs[group] = x
