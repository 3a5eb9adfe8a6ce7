"""Routed experts with a torch.nn.Linear for every projection, in place of transformers' fused tensors.

transformers keeps the experts of a block in 3-D parameters and multiplies them in one kernel. Here each
expert's projections are modules that are called, as the linears of a dense block are: whatever observes or
replaces linears needs to know nothing about experts. Activation and gating stay transformers' own.

Legend: B sequences, T positions, N tokens, D hidden, K experts chosen a token, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn


class Expert(nn.Module):
    """The linears of one expert: ``gate_proj`` (unless it has no gate), ``up_proj``, ``down_proj``."""

    def __init__(self, **linears: nn.Linear) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class Experts(nn.Module):
    """All experts of a block, as children ``0``, ``1``, ...

    Attributes:
        fused: transformers' module without the weights that the experts took over; knows how to gate.
        num_experts: E.
        inputs: Is called with all that experts may be given, once a forward, [rows, D]: there observers look.
        tokens: Of every row that a linear, or ``inputs``, is just called with, its token among all B * T.
        num_extra: Rows that each expert runs besides its own, for those who observe it: evenly spaced among
            all that it may be given, from another one for each expert. They change no output.
        is_extra: Whether a linear is just called with such rows.
    """

    def __init__(self, experts: list[Expert], fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(experts)
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.fused = fused
        self.inputs = nn.Identity()
        self.tokens: torch.Tensor | None = None
        self.num_extra, self.is_extra = 0, False

    def expert(self, index: int) -> Expert:
        """One of the experts."""
        return cast(Expert, self._modules[str(index)])

    def show(self, x_ND: torch.Tensor) -> None:
        """Call each expert's linears once, on tokens of its own, where there are no values to choose by."""
        for index in range(self.num_experts):
            linears = dict(self.expert(index).named_children())
            down = linears.pop("down_proj")
            tokens_ND = torch.empty_like(x_ND)
            for linear in linears.values():
                linear(tokens_ND)
            down(x_ND.new_empty(len(x_ND), cast(nn.Linear, down).in_features))

    def _given(self, rows_ND: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """Tell observers what the experts may be given."""
        self.tokens = tokens_N
        self.inputs(rows_ND)

    def _outputs(
        self, index: int, rows_ND: torch.Tensor, tokens_N: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor | None:
        """Outputs of an expert for the rows that are its own, None if it has none."""
        if self.num_extra:
            extra = self._extra(index, rows_ND)
            self.tokens, self.is_extra = tokens_N[extra], True
            self._run(self.expert(index), rows_ND[extra])
            self.is_extra = False
        self.tokens = tokens_N[own]
        return self._run(self.expert(index), rows_ND[own]) if own.numel() else None

    def _extra(self, index: int, rows_ND: torch.Tensor) -> torch.Tensor:
        available = len(rows_ND)
        places = torch.arange(min(self.num_extra, available), device=rows_ND.device)
        if len(places) == available:
            return places
        return (places * available // len(places) + index * available // self.num_experts) % available

    def _run(self, expert: Any, x_ND: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class RoutedExperts(Experts):
    """Experts that choose their tokens by index, transformers' ``use_experts_implementation`` interface."""

    def forward(
        self, hidden: torch.Tensor, top_k_index_NK: torch.Tensor, top_k_weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden: floating [N, D], or [B, T, D] of as many tokens; the same tokens as the block's, in order.
            top_k_index_NK: integer [N, K]; indices from E on stand for no expert.
            top_k_weights_NK: floating [N, K].

        Returns:
            Shape and dtype of ``hidden``.

        Numerics: outputs are added expert by expert, in their dtype, as transformers' eager forward does.
        """
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        if hidden.is_meta:
            self.show(hidden_ND)
            return hidden.clone()
        summed_ND = torch.zeros_like(hidden_ND)
        everything = torch.arange(len(hidden_ND), device=hidden.device)
        self._given(hidden_ND, everything)
        for index in range(self.num_experts):
            tokens, choices = _chosen(top_k_index_NK, index)
            output = self._outputs(index, hidden_ND, everything, tokens)
            if output is not None:
                weighted = output * top_k_weights_NK[tokens, choices, None]
                summed_ND.index_add_(0, tokens, weighted.to(summed_ND.dtype))
        return summed_ND.view_as(hidden)

    def _run(self, expert: Any, x_ND: torch.Tensor) -> torch.Tensor:
        fused: Any = self.fused
        if fused.has_gate:
            gate, up = expert.gate_proj(x_ND), expert.up_proj(x_ND)
            inner = fused._apply_gate(_joined(gate, up, is_concatenated=fused.is_concatenated))
        else:
            inner = fused.act_fn(expert.up_proj(x_ND))
        output = expert.down_proj(inner)
        return fused.post_expert_norm(output) if fused.has_post_expert_norm else output


class SortedExperts(Experts):
    """Experts that are handed all tokens once each, scaled by the router (zero where it did not choose)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs in the order of the inputs. Shapes: floating [E * N, D] in and out."""
        if hidden.is_meta:
            self.show(hidden.chunk(self.num_experts)[0])
            return hidden.clone()
        # Rows of zeros give zeros: these experts have no biases.
        chosen = hidden.any(dim=-1).nonzero().squeeze(-1)
        num_tokens = len(hidden) // self.num_experts
        rows_ND, tokens_N, owners_N = hidden[chosen], chosen % num_tokens, chosen // num_tokens
        self._given(rows_ND, tokens_N)
        output = torch.zeros_like(hidden)
        for index in range(self.num_experts):
            own = (owners_N == index).nonzero().squeeze(-1)
            rows = self._outputs(index, rows_ND, tokens_N, own)
            if rows is not None:
                output[chosen[own]] = rows
        return output

    def _run(self, expert: Any, x_ND: torch.Tensor) -> torch.Tensor:
        fused: Any = self.fused
        return expert.down_proj(expert.up_proj(x_ND) * fused.act_fn(expert.gate_proj(x_ND)))


@contextmanager
def extra_rows(experts: Experts, num_rows: int) -> Iterator[None]:
    """While it lasts, every expert runs so many rows besides its own (see `Experts.num_extra`)."""
    experts.num_extra = num_rows
    try:
        yield
    finally:
        experts.num_extra, experts.is_extra = 0, False


def _chosen(top_k_index_NK: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that chose an expert, and as which of their choices."""
    choices, tokens = top_k_index_NK.T.eq(index).nonzero(as_tuple=True)
    return tokens, choices


def _joined(gate: torch.Tensor, up: torch.Tensor, *, is_concatenated: bool) -> torch.Tensor:
    """Gate and up as one tensor, in the order that the fused module's gating expects."""
    return torch.cat([gate, up], dim=-1) if is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
