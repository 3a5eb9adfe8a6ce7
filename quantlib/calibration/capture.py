"""What the linears of a block read while it runs: one gram matrix for each input group.

N tokens, C columns, B sequences, T positions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlib.calibration.hessian import gram_lower


@dataclass(slots=True)
class InputStatistics:
    """Partial statistics of one cell.

    Attributes:
        grams: One fp32 [C, C] a group, lower triangle valid; None for a group that was not reached.
        num_tokens: Tokens counted.
        bad_rows: Sequences of the cell in which some group saw a NaN or an infinity. When there are any,
            the grams are worthless and the cell is to be run again without these rows.
    """

    grams: list[torch.Tensor | None]
    num_tokens: int = 0
    bad_rows: set[int] = field(default_factory=set)


class InputObserver:
    """Watches the inputs of a block's groups during one forward pass.

    Args:
        block: The live block.
        leaders: One linear a group, named relative to the block; all of a group read the same tensor.
        num_rows: Sequences in the cell.
        left_out: Sequences that are not to be counted.
    """

    def __init__(
        self, block: nn.Module, leaders: Sequence[str], *, num_rows: int, left_out: Collection[int]
    ) -> None:
        self._kept = torch.tensor([row for row in range(num_rows) if row not in left_out], dtype=torch.long)
        self._num_rows = num_rows
        self.statistics = InputStatistics(grams=[None] * len(leaders))
        self._hooks = [
            block.get_submodule(name).register_forward_pre_hook(self._hook_for(group))
            for group, name in enumerate(leaders)
        ]

    def __enter__(self) -> "InputObserver":
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook_for(self, group: int):  # noqa: ANN202 - the type is torch's own
        def observe(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._observe(group, arguments[0])

        return observe

    def _observe(self, group: int, x: torch.Tensor) -> None:
        columns = x.shape[-1]
        x_BTC = x.reshape(self._num_rows, -1, columns)
        if len(self._kept) < self._num_rows:
            x_BTC = x_BTC[self._kept.to(x.device)]
        x_NC = x_BTC.reshape(-1, columns)
        gram_CC = gram_lower(x_NC)
        # A non-finite input shows in the sum of squares of its column: no second pass over the tokens.
        if not torch.isfinite(gram_CC.diagonal()).all():
            finite_B = torch.isfinite(x_BTC).flatten(1).all(dim=1).cpu()
            self.statistics.bad_rows |= set(self._kept[~finite_B].tolist())
        self.statistics.grams[group] = gram_CC
        self.statistics.num_tokens = x_NC.shape[0]
