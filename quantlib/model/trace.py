"""What one forward of the meta model shows: which linears read the same tensor, what runs around the blocks.

Structure is read off the run, never off names. Nothing is computed: all tensors are on the meta device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from quantlib.errors import UnsupportedModelError
from quantlib.model.materialize import copy_module

# Any small shape shows the same structure; more than one position keeps attention on its usual path.
_TRACED_SHAPE = (1, 8)


@dataclass(slots=True, kw_only=True)
class BlockTrace:
    """One block's part of the run.

    Attributes:
        groups: One dict a tensor that linears read: module names inside the block, in call order.
        num_outputs: Length of the tuple the block returns; None when it returns the hidden state itself.
    """

    groups: dict[tuple[Any, ...], list[str]] = field(default_factory=dict)
    num_outputs: int | None = None


@dataclass(slots=True, kw_only=True)
class ModelTrace:
    """The run as a whole.

    Attributes:
        blocks: In order.
        prelude: Paths of the modules outside the blocks that ran before block 0, in call order.
        tail: Those that ran after the last block.
    """

    blocks: list[BlockTrace]
    prelude: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def trace_forward(model: PreTrainedModel, blocks_path: str) -> ModelTrace:
    """Run a copy of the meta model once and record what its modules were called with.

    A copy, since modules may keep what they computed (long rotary frequencies), here without values.

    Raises:
        UnsupportedModelError: Blocks do not run once each in order, a module outside runs between them, or a
            linear runs twice.
    """
    model = copy_module(model)
    blocks = cast(nn.ModuleList, model.get_submodule(blocks_path))
    tracer = _Tracer(model_type=model.config.model_type, num_blocks=len(blocks))
    ids_BT = torch.zeros(_TRACED_SHAPE, dtype=torch.long, device="meta")
    with tracer.hooked(model, blocks_path, blocks), torch.no_grad(), _NoValues():
        model(input_ids=ids_BT, use_cache=False, return_dict=True)
    tracer.refuse_unless(tracer.finished == len(blocks), "not every decoder block runs")
    return tracer.trace


class _NoValues(TorchDispatchMode):
    """Answers zero or False when a forward looks at a value (``if mask.all()``), which meta tensors lack.

    Such branches choose among equivalent masks and frequencies, not among modules.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


class _Tracer:
    """The hooks' shared state: which block runs, and what was seen."""

    def __init__(self, *, model_type: str, num_blocks: int) -> None:
        self.model_type = model_type
        self.trace = ModelTrace(blocks=[BlockTrace() for _ in range(num_blocks)])
        self.running: int | None = None
        self.finished = 0
        # Inputs stay alive until the run ends: a freed storage's address could come back as another tensor.
        self._kept: list[torch.Tensor] = []
        self._seen: set[tuple[int, str]] = set()

    def refuse_unless(self, holds: bool, problem: str) -> None:
        if not holds:
            raise UnsupportedModelError(
                f"{self.model_type}: {problem}; the model cannot be run block by block",
                model_type=self.model_type,
            )

    @contextmanager
    def hooked(self, model: nn.Module, blocks_path: str, blocks: nn.ModuleList) -> Iterator[None]:
        handles = []
        for path, module in model.named_modules():
            inside = path == blocks_path or path.startswith(f"{blocks_path}.")
            if not inside and has_own_tensors(module):
                handles.append(module.register_forward_pre_hook(self._outside_hook(path)))
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(self._begin_hook(index)))
            handles.append(block.register_forward_hook(self._end_hook(index)))
            for path, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    hook = self._linear_hook(index, path)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _outside_hook(self, path: str) -> Any:
        def record(*_: Any) -> None:
            at_an_end = self.running is None and self.finished in (0, len(self.trace.blocks))
            self.refuse_unless(at_an_end, f"{path} runs between decoder blocks")
            modules = self.trace.prelude if self.finished == 0 else self.trace.tail
            modules.append(path)

        return record

    def _begin_hook(self, index: int) -> Any:
        def record(*_: Any) -> None:
            in_order = self.running is None and self.finished == index
            self.refuse_unless(in_order, f"decoder block {index} runs out of order or twice")
            self.running = index

        return record

    def _end_hook(self, index: int) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            is_tuple = isinstance(output, tuple | list)
            self.trace.blocks[index].num_outputs = len(output) if is_tuple else None
            self.running, self.finished = None, index + 1

        return record

    def _linear_hook(self, index: int, path: str) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.refuse_unless((index, path) not in self._seen, f"{path} of block {index} runs twice")
            self._seen.add((index, path))
            x = args[0] if args else kwargs["input"]
            self._kept.append(x)
            self.trace.blocks[index].groups.setdefault(_content_key(x), []).append(path)

        return record


def has_own_tensors(module: nn.Module) -> bool:
    """Whether a module itself (not its children) owns tensors that a checkpoint stores."""
    return bool(own_tensors(module))


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers of a module itself, by attribute name, in registration order."""
    owned: dict[str, torch.Tensor] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            owned[name] = parameter
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            owned[name] = tensor
    return owned


def _content_key(x: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same rows: one object, or views of it that only regroup the rows.

    Two slices of one tensor differ in offset or size, and a tensor changed in place differs in version.
    """
    layout = (x.numel(), x.shape[-1]) if x.is_contiguous() else (tuple(x.shape), x.stride())
    return (x.untyped_storage()._cdata, x.storage_offset(), x._version, layout)
