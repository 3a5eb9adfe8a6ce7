"""What a decoder block consists of: stored tensors, linears, and which linears read the same tensor."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from quantlib.errors import UnsupportedModelError
from quantlib.model.experts import Experts
from quantlib.model.late_weights import is_plain_linear
from quantlib.model.materialize import Slot
from quantlib.model.sources import Sources
from quantlib.model.trace import BlockTrace
from quantlib.strided_view import StoredPart, StridedView


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """One linear; rows are out, columns in features.

    Attributes:
        name: Under which its tensors are written: its checkpoint name without ``.weight`` where its weight is
            stored as a tensor of its own, else its place in the block under the block's prefix.
        path: Of the module, inside the block.
        experts: Path of the module of routed experts it is in; None for one that every token goes through.
        expert: Which of them it belongs to; None likewise.
        weight_tensors: Stored tensors that the weight is read from; several when transformers computes it.
        weight_view: The part of the one stored tensor, or its transpose; None when it is all of it as it is.
        bias: Where its bias is read from; None without one.
    """

    name: str
    path: str
    rows: int
    columns: int
    experts: str | None
    expert: int | None
    weight_tensors: tuple[str, ...]
    weight_view: StridedView | None
    bias: StoredPart | None

    @property
    def has_own_bias(self) -> bool:
        """Whether the checkpoint holds a bias under its name."""
        return self.bias == StoredPart(tensor=f"{self.name}.bias")

    @property
    def is_stored_as_is(self) -> bool:
        """Whether the checkpoint holds the weight under its own name, in its own orientation."""
        return self.weight_view is None and self.weight_tensors == (f"{self.name}.weight",)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """One decoder block.

    Attributes:
        index: 0-based position.
        prefix: What the checkpoint names of its tensors begin with (``model.layers.17``).
        tensors: Checkpoint names of all its tensors.
        linears: Those that can be quantized, in the order they run. Routers and gates are tensors only.
        input_groups: Names of all linears, those that read the same tensor together, in the order they run.
        kept_linears: Names of linears that cannot be quantized: routers, gates, those with another forward.
    """

    index: int
    prefix: str
    tensors: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    input_groups: tuple[tuple[str, ...], ...]
    kept_linears: tuple[str, ...]


def refuse_unhandled(prefix: str, blocks: Iterable[nn.Module]) -> None:
    """Refuse what cannot be quantized or run causally, before the model is traced.

    Small matrices of other modules (routers, convolutions, decays) are kept as they are.

    Raises:
        UnsupportedModelError: Attention is not causal, or most weights of the blocks are not of linears.
    """
    linears, others = 0, {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            name = _joined(prefix, str(index), path)
            if getattr(module, "is_causal", True) is False:
                raise UnsupportedModelError(
                    f"{name}: its attention is not causal; wanted a causal language model", module=name
                )
            for attribute, tensor in module.named_parameters(recurse=False):
                if isinstance(module, nn.Linear):
                    linears += tensor.numel()
                elif tensor.ndim >= 2:
                    others[f"{name}.{attribute}"] = tensor
    if sum(tensor.numel() for tensor in others.values()) > linears:
        name = max(others, key=lambda found: others[found].numel())
        raise UnsupportedModelError(
            f"{name}: a {others[name].ndim}-D weight that is not of a torch.nn.Linear; most weights of the"
            " blocks must be weights of linears (this form of experts is not handled)",
            tensor=name,
        )


def describe_block(
    place: str, block: nn.Module, trace: BlockTrace, slots: Sequence[Slot], sources: Sources
) -> BlockSpec:
    """A block's parts, from its meta module and what the traced run showed.

    Args:
        place: Path of the block in the model; it ends in the block's position.
        block: On the meta device, its modules replaced.
        trace: What running it showed.
        slots: All slots of the block.
        sources: Where its tensors are stored.

    Raises:
        UnsupportedModelError: A linear was not called.
    """
    index = int(place.rpartition(".")[2])
    tensors = sources.stored(slots)
    prefix = _common_prefix(tensors, index) or place
    kept = kept_linears(block)
    called = [path for group in trace.groups.values() for path in group]
    places = {(slot.path, slot.attribute): slot for slot in slots}
    linears = {
        path: _describe_linear(prefix, path, block, places, sources) for path in called if path not in kept
    }
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and path not in called:
            raise _not_called(_joined(place, path))
    groups = (
        tuple(linears[path].name for path in group if path in linears) for group in trace.groups.values()
    )
    return BlockSpec(
        index=index,
        prefix=prefix,
        tensors=tensors,
        linears=tuple(linears.values()),
        input_groups=tuple(group for group in groups if group),
        kept_linears=tuple(
            _describe_linear(prefix, path, block, places, sources).name
            for path in sorted(kept)
            if (path, "weight") in places
        ),
    )


def _describe_linear(
    prefix: str, path: str, block: nn.Module, slots: Mapping[tuple[str, str], Slot], sources: Sources
) -> LinearSpec:
    weight, bias = slots[path, "weight"], slots.get((path, "bias"))
    module = cast(nn.Linear, block.get_submodule(path))
    experts, expert = _expert_of(block, path)
    whole = weight.view is None or math.prod(weight.view.whole) == math.prod(weight.view.size)
    has_name = whole and not sources.is_converted(weight) and weight.tensor.endswith(".weight")
    return LinearSpec(
        name=weight.tensor.removesuffix(".weight") if has_name else _joined(prefix, path),
        path=path,
        rows=module.out_features,
        columns=module.in_features,
        experts=experts,
        expert=expert,
        weight_tensors=sources.stored([weight]),
        weight_view=weight.view,
        bias=None if bias is None else StoredPart(tensor=bias.tensor, view=bias.view),
    )


def _expert_of(block: nn.Module, path: str) -> tuple[str, int] | tuple[None, None]:
    parts = path.split(".")
    for length in range(len(parts) - 1):
        experts = ".".join(parts[:length])
        if isinstance(block.get_submodule(experts), Experts):
            return experts, int(parts[length])
    return None, None


def _common_prefix(names: Sequence[str], index: int) -> str | None:
    """The longest module path that all names begin with; None when it does not say of which block."""
    common = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) if str(index) in common else None


def _not_called(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: the linear is not called when its block runs, so its input cannot be observed;"
        " linears must be called as modules",
        module=name,
    )


def kept_linears(block: nn.Module) -> frozenset[str]:
    """Paths of the linears that are kept as they are.

    Subclasses with a forward of their own, whose rows may not read all they are called with, and those that
    choose or weigh experts: of the module that owns the experts, or of a child of it with no other linear,
    those with one output an expert (the router), or a single output (the gate of shared experts).
    """
    found = {
        path
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and not is_plain_linear(module)
    }
    for path, experts in block.named_modules():
        if not isinstance(experts, Experts):
            continue
        owner = path.rpartition(".")[0]
        for name, module in block.get_submodule(owner).named_modules():
            inside = _joined(owner, name)
            if inside == path or inside.startswith(f"{path}.") or not isinstance(module, nn.Linear):
                continue
            parent = inside.rpartition(".")[0]
            siblings = sum(isinstance(child, nn.Linear) for child in block.get_submodule(parent).children())
            if module.out_features in (1, experts.num_experts) and (parent == owner or siblings == 1):
                found.add(inside)
    return frozenset(found)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
