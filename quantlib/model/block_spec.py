"""What a decoder block consists of: stored tensors, linears, and which linears read the same tensor."""

from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from quantlib.errors import UnsupportedModelError
from quantlib.model.trace import BlockTrace, own_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """One linear. ``name`` is its checkpoint name without ``.weight``; rows are out, columns in features."""

    name: str
    rows: int
    columns: int
    has_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """One decoder block.

    Attributes:
        index: 0-based position.
        prefix: Module name (``model.layers.17``).
        tensors: Checkpoint names of all its tensors.
        linears: In the order they run.
        input_groups: Names of all linears, those that read the same tensor together, in the order they run.
    """

    index: int
    prefix: str
    tensors: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    input_groups: tuple[tuple[str, ...], ...]


def refuse_unhandled(prefix: str, block: nn.Module) -> None:
    """Refuse what cannot be quantized or run causally, before the model is traced.

    Raises:
        UnsupportedModelError: A matrix is not the weight of a linear, or attention is not causal.
    """
    for path, module in block.named_modules():
        name = _joined(prefix, path)
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{name}: its attention is not causal; wanted a causal language model", module=name
            )
        if isinstance(module, nn.Linear):
            continue
        for attribute, tensor in own_tensors(module).items():
            if tensor.ndim >= 2:
                raise UnsupportedModelError(
                    f"{name}.{attribute}: a {tensor.ndim}-D weight of {type(module).__name__}, which is not"
                    " a torch.nn.Linear; every matrix of a block must be the weight of one"
                    " (fused experts and Conv1D are not handled)",
                    tensor=f"{name}.{attribute}",
                )


def describe_block(index: int, prefix: str, block: nn.Module, trace: BlockTrace) -> BlockSpec:
    """A block's parts, from its meta module and what the traced run showed.

    Raises:
        UnsupportedModelError: A linear was not called.
    """
    groups = tuple(tuple(_joined(prefix, path) for path in group) for group in trace.groups.values())
    called = {name: position for position, name in enumerate(name for group in groups for name in group)}
    linears = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            linears.append(_describe_linear(_joined(prefix, path), module, called))
    tensors = [
        _joined(prefix, path, name) for path, module in block.named_modules() for name in own_tensors(module)
    ]
    return BlockSpec(
        index=index,
        prefix=prefix,
        tensors=tuple(tensors),
        linears=tuple(sorted(linears, key=lambda linear: called[linear.name])),
        input_groups=groups,
    )


def _describe_linear(name: str, module: nn.Linear, called: Container[str]) -> LinearSpec:
    if name not in called:
        raise UnsupportedModelError(
            f"{name}: the linear is not called when its block runs, so its input cannot be observed;"
            " linears must be called as modules",
            module=name,
        )
    return LinearSpec(
        name=name, rows=module.out_features, columns=module.in_features, has_bias=module.bias is not None
    )


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
