"""Modules that are linears in another form become linears: fused experts, and GPT-2's Conv1D.

The new weights are views of the parameters they replace, so that `quantlib.model.strided` can tell from where
in a stored tensor each is read. Experts are known by the interface they share. Named are only modules that do
the same without saying so: Falcon's linear, and the experts of Llama 4 and DBRX.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.pytorch_utils import Conv1D

from quantlib.model.experts import Expert, Experts, RoutedExperts, SortedExperts


def linearize_(block: nn.Module) -> None:
    """Replace such modules inside a block on the meta device."""
    for path, module in list(block.named_modules()):
        made = _linearized(module)
        if made is not None:
            block.set_submodule(path, made)


def _linearized(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Conv1D):
        return linear_of(module.weight.T, module.bias)
    if isinstance(module, FalconLinear):
        return linear_of(module.weight, module.bias)
    if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
        return _routed_experts(module)
    if isinstance(module, Llama4TextExperts):
        return _with_experts(SortedExperts, module, _fused_projections(module, is_transposed=True))
    if isinstance(module, DbrxExperts):
        return _dbrx_experts(module)
    return None


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A linear on given tensors, [out, in] and [out], without copying them."""
    # Not by its constructor: to initialise 40 thousand of them, even on meta, takes seconds.
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    has_bias = bias is not None
    linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False) if has_bias else None)
    return linear.eval()


_Projections = list[dict[str, tuple[torch.Tensor, torch.Tensor | None]]]


def _routed_experts(fused: Any) -> nn.Module:
    projections = _fused_projections(
        fused,
        is_transposed=fused.is_transposed,
        has_gate=fused.has_gate,
        is_concatenated=fused.is_concatenated,
    )
    return _with_experts(RoutedExperts, fused, projections)


def _fused_projections(
    fused: Any, *, is_transposed: bool, has_gate: bool = True, is_concatenated: bool = True
) -> _Projections:
    """Weight [out, in] and bias [out] of every expert's projections, from one tensor of all experts each."""

    def of_all(name: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        weight, bias = getattr(fused, name), getattr(fused, f"{name}_bias", None)
        weight = weight.transpose(1, 2) if is_transposed else weight
        return list(zip(weight, [None] * len(weight) if bias is None else bias, strict=True))

    downs = of_all("down_proj")
    if not has_gate:
        return [{"up_proj": up, "down_proj": down} for up, down in zip(of_all("up_proj"), downs, strict=True)]
    halves = _halves if is_concatenated else _interleaved
    return [
        {
            "gate_proj": (halves(weight)[0], None if bias is None else halves(bias)[0]),
            "up_proj": (halves(weight)[1], None if bias is None else halves(bias)[1]),
            "down_proj": down,
        }
        for (weight, bias), down in zip(of_all("gate_up_proj"), downs, strict=True)
    ]


def _halves(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    middle = len(rows) // 2
    return rows[:middle], rows[middle:]


def _interleaved(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows[::2], rows[1::2]


def _dbrx_experts(fused: Any) -> nn.Module:
    """All experts' rows stand one below the other, and down is stored transposed."""
    shape = (fused.num_experts, fused.ffn_hidden_size, fused.hidden_size)
    glu = fused.mlp
    gates, ups, downs = (weight.view(shape) for weight in (glu.w1, glu.v1, glu.w2))
    projections: _Projections = [
        {"gate_proj": (gate, None), "up_proj": (up, None), "down_proj": (down.T, None)}
        for gate, up, down in zip(gates, ups, downs, strict=True)
    ]
    fused.has_gate, fused.is_concatenated, fused.has_post_expert_norm = True, True, False
    activation = glu.activation_fn
    fused._apply_gate = _gating(activation)
    for name in ("w1", "v1", "w2"):
        glu.register_parameter(name, None)
    return _with_experts(RoutedExperts, fused, projections)


def _gating(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    return apply_gate


def _with_experts(kind: type[Experts], fused: nn.Module, projections: _Projections) -> nn.Module:
    experts = [
        Expert(**{name: linear_of(weight, bias) for name, (weight, bias) in expert.items()})
        for expert in projections
    ]
    for name in list(fused._parameters):
        fused.register_parameter(name, None)
    return kind(experts, fused).eval()
