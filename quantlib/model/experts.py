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
        sends_all_tokens: Every linear sees all tokens, for those who observe it; only the chosen rows count.
    """

    def __init__(self, experts: list[Expert], fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.sends_all_tokens = False
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.fused = fused

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


class RoutedExperts(Experts):
    """Experts that choose their tokens by index, transformers' ``use_experts_implementation`` interface."""

    def forward(
        self, hidden: torch.Tensor, top_k_index_NK: torch.Tensor, top_k_weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden: floating [N, D], or [B, T, D] of as many tokens.
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
        for index in range(self.num_experts):
            tokens, choices = _chosen(top_k_index_NK, index)
            if self.sends_all_tokens:
                output = self._run(self.expert(index), hidden_ND)[tokens]
            elif tokens.numel():
                output = self._run(self.expert(index), hidden_ND[tokens])
            else:
                continue
            weighted = output * top_k_weights_NK[tokens, choices, None]
            summed_ND.index_add_(0, tokens, weighted.to(summed_ND.dtype))
        return summed_ND.view_as(hidden)

    def _run(self, expert: Any, x: torch.Tensor) -> torch.Tensor:
        fused: Any = self.fused
        if fused.has_gate:
            gate, up = expert.gate_proj(x), expert.up_proj(x)
            inner = fused._apply_gate(_joined(gate, up, is_concatenated=fused.is_concatenated))
        else:
            inner = fused.act_fn(expert.up_proj(x))
        output = expert.down_proj(inner)
        return fused.post_expert_norm(output) if fused.has_post_expert_norm else output


class SortedExperts(Experts):
    """Experts that are handed all tokens once each, scaled by the router (zero where it did not choose)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs in the order of the inputs. Shapes: floating [E * N, D] in and out."""
        if hidden.is_meta:
            self.show(hidden.chunk(self.num_experts)[0])
            return hidden.clone()
        outputs = [self._run(self.expert(index), x) for index, x in enumerate(hidden.chunk(self.num_experts))]
        return torch.cat(outputs)

    def _run(self, expert: Any, x_ND: torch.Tensor) -> torch.Tensor:
        # Rows of zeros give zeros: these experts have no biases.
        if self.sends_all_tokens:
            tokens = torch.arange(len(x_ND), device=x_ND.device)
        else:
            tokens = x_ND.any(dim=-1).nonzero().squeeze(-1)
        output_ND = torch.zeros_like(x_ND)
        if tokens.numel():
            x = x_ND[tokens]
            fused: Any = self.fused
            output_ND[tokens] = expert.down_proj(expert.up_proj(x) * fused.act_fn(expert.gate_proj(x)))
        return output_ND


@contextmanager
def all_tokens_to_all_experts(block: nn.Module) -> Iterator[None]:
    """While it lasts, every expert's linears see all tokens of a forward.

    The block's output is still that of the chosen experts, to rounding: more rows are multiplied at once.
    """
    found = [module for module in block.modules() if isinstance(module, Experts)]
    for module in found:
        module.sends_all_tokens = True
    try:
        yield
    finally:
        for module in found:
            module.sends_all_tokens = False


def _chosen(top_k_index_NK: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that chose an expert, and as which of their choices."""
    choices, tokens = top_k_index_NK.T.eq(index).nonzero(as_tuple=True)
    return tokens, choices


def _joined(gate: torch.Tensor, up: torch.Tensor, *, is_concatenated: bool) -> torch.Tensor:
    """Gate and up as one tensor, in the order that the fused module's gating expects."""
    return torch.cat([gate, up], dim=-1) if is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
