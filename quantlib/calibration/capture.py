"""What the linears of a block read while it runs: one gram matrix for each input group.

N tokens, C columns, B sequences, T positions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from quantlib.calibration.hessian import cross_product, gram_lower
from quantlib.calibration.moments import with_sums


@dataclass(slots=True)
class InputStatistics:
    """Partial statistics of one cell.

    Attributes:
        grams: Group -> fp32 [C, C], lower triangle valid. With sums beside them, [C + 1, C + 1], for groups
            that are to be centered (`moments.with_sums`).
        crosses: Group -> X_ref^T X, fp32, likewise, where there is a reference.
        num_tokens: Tokens counted.
        bad_rows: Sequences of the cell in which some group saw a NaN or an infinity. When there are any,
            the grams are worthless and the cell is to be run again without these rows.
    """

    grams: dict[int, torch.Tensor] = field(default_factory=dict)
    crosses: dict[int, torch.Tensor] = field(default_factory=dict)
    num_tokens: int = 0
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
    """Watches the inputs of a block's groups during one forward pass.

    Args:
        block: The live block.
        leaders: One linear a group, named relative to the block; all of a group read the same tensor.
        num_rows: Sequences in the cell.
        left_out: Sequences that are not to be counted.
        summed: Groups whose products are wanted; the others are only looked through for bad rows.
        references: For each group what it read in the reference stream, [B, T, C].
        centered: Groups whose sums are wanted beside their products.
    """

    def __init__(
        self,
        block: nn.Module,
        leaders: Sequence[str],
        *,
        num_rows: int,
        left_out: Collection[int],
        summed: Collection[int],
        references: Sequence[torch.Tensor] = (),
        centered: Collection[int] = (),
    ) -> None:
        self._summed, self._centered = summed, centered
        self._kept = torch.tensor([row for row in range(num_rows) if row not in left_out], dtype=torch.long)
        self._num_rows = num_rows
        self._references = references
        self.statistics = InputStatistics()
        super().__init__(block, leaders)

    def _see(self, group: int, x: torch.Tensor) -> None:
        x_BTC = self._counted(x)
        self.statistics.num_tokens = x_BTC[..., 0].numel()
        reference_BTC = self._counted(self._references[group]) if self._references else None
        if reference_BTC is not None:
            self._look_through(reference_BTC)
        if group not in self._summed:
            # Of finite values the sum may overflow too, but then no row is to blame.
            if not torch.isfinite(x_BTC.sum(dtype=torch.float32)):
                self._look_through(x_BTC)
            return
        x_NC = x_BTC.flatten(0, 1)
        gram_CC = gram_lower(x_NC)
        # A non-finite input shows in the sum of squares of its column: no second pass over the tokens.
        if not torch.isfinite(gram_CC.diagonal()).all():
            self._look_through(x_BTC)
        is_centered = group in self._centered
        self.statistics.grams[group] = with_sums(gram_CC, x_NC, x_NC) if is_centered else gram_CC
        if reference_BTC is not None:
            reference_NC = reference_BTC.flatten(0, 1)
            cross_CC = cross_product(reference_NC, x_NC)
            self.statistics.crosses[group] = (
                with_sums(cross_CC, reference_NC, x_NC) if is_centered else cross_CC
            )

    def _look_through(self, x_BTC: torch.Tensor) -> None:
        finite_B = torch.isfinite(x_BTC).flatten(1).all(dim=1).cpu()
        self.statistics.bad_rows |= set(self._kept[~finite_B].tolist())

    def _counted(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] without the sequences that are left out."""
        x_BTC = x.reshape(self._num_rows, -1, x.shape[-1])
        return x_BTC[self._kept.to(x.device)] if len(self._kept) < self._num_rows else x_BTC


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
