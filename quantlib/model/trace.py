"""What one forward of the meta model shows: which linears read the same tensor, what runs around the blocks.

Structure is read off the run, never off names. Nothing is computed: all tensors are on the meta device.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from quantlib.errors import UnsupportedModelError
from quantlib.model.experts import Expert
from quantlib.model.materialize import copy_module

# Any small shape shows the same structure; more than one position keeps attention on its usual path.
TRACED_SHAPE = (1, 8)


@dataclass(slots=True, kw_only=True)
class BlockTrace:
    """One block's part of the run.

    Attributes:
        groups: One dict a tensor that linears read: module names inside the block, in call order.
        num_outputs: Length of the tuple the block returns; None when it returns the hidden state itself.
        inputs: Form of what the block is called with besides the hidden state.
    """

    groups: dict[tuple[Any, ...], list[str]] = field(default_factory=dict)
    num_outputs: int | None = None
    inputs: Any = None


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
        UnsupportedModelError: Blocks do not run once each in order, something happens to the hidden state
            between them, or a linear runs twice.
    """
    # Experts and linears keep nothing, and there may be 40 thousand of them.
    shared = {id(module): module for module in model.modules() if type(module) in (nn.Linear, Expert)}
    model = copy_module(model, shared)
    blocks = cast(nn.ModuleList, model.get_submodule(blocks_path))
    tracer = _Tracer(model_type=model.config.model_type, num_blocks=len(blocks))
    ids_BT = torch.zeros(TRACED_SHAPE, dtype=torch.long, device="meta")
    # Not for gradients: requires_grad marks what a block made, wherever it is handed on to.
    marking = torch.enable_grad()
    with refusing(model, "run on tensors without values"), tracer.hooked(model, blocks_path, blocks), marking:
        output = model(input_ids=ids_BT, use_cache=False, return_dict=True)
    tracer.refuse_unless(tracer.finished == len(blocks), "not every decoder block runs")
    tracer.refuse_unless(
        not _is_marked(output), "what follows the last decoder block reads what earlier ones made"
    )
    return tracer.trace


@contextmanager
def refusing(model: PreTrainedModel, wanted: str) -> Iterator[None]:
    """Values are absent inside, and what transformers raises for whatever reason is a refusal."""
    try:
        with _NoValues():
            yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UnsupportedModelError(
            f"{model.config.model_type}: its forward does not {wanted} ({type(error).__name__}: {error});"
            " the model cannot be run block by block",
            model_type=model.config.model_type,
        ) from error


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
        self._output: torch.Tensor | None = None

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
            handles.append(block.register_forward_pre_hook(self._begin_hook(index), with_kwargs=True))
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
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            in_order = self.running is None and self.finished == index
            self.refuse_unless(in_order, f"decoder block {index} runs out of order or twice")
            hidden, args, kwargs = split_hidden(args, kwargs)
            untouched = self._output is None or content_key(hidden) == content_key(self._output)
            self.refuse_unless(untouched, f"the hidden state changes before decoder block {index}")
            self.refuse_unless(
                not _is_marked((args, kwargs)),
                f"decoder block {index} is handed more than the hidden state of what earlier ones made",
            )
            self.trace.blocks[index].inputs = form_of((args, kwargs))
            self.running = index

        return record

    def _end_hook(self, index: int) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple | list)
            self.trace.blocks[index].num_outputs = len(output) if is_tuple else None
            self.running, self.finished = None, index + 1
            # The last block's output may be read by all that follows.
            is_last = self.finished == len(self.trace.blocks)
            marked = [_marked(value, not is_last) for value in (output if is_tuple else [output])]
            self._output = marked[0]
            return type(output)(marked) if is_tuple else marked[0]

        return record

    def _linear_hook(self, index: int, path: str) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.refuse_unless((index, path) not in self._seen, f"{path} of block {index} runs twice")
            self._seen.add((index, path))
            x = args[0] if args else kwargs["input"]
            self._kept.append(x)
            self.trace.blocks[index].groups.setdefault(content_key(x), []).append(path)

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


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's hidden state, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    others = dict(kwargs)
    return others.pop("hidden_states"), (), others


def form_of(value: Any) -> Any:
    """What two values must have in common for one to stand for the other: kinds and shapes, not numbers."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return {key: form_of(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [form_of(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | None) else type(value)


def _marked(value: Any, mark: bool) -> Any:
    """A stand-alone copy of a tensor that a block returns; marked as such if ``mark``."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    # Cloned, since the model may work in place, which a leaf does not allow.
    return value.detach().requires_grad_().clone() if mark else value.detach()


def _is_marked(value: Any) -> bool:
    """Whether a block made any tensor in a value, or what it was computed from."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        return any(_is_marked(inner) for inner in value.values())
    return isinstance(value, tuple | list) and any(_is_marked(inner) for inner in value)


def content_key(x: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same rows: one object, or views of it that only regroup the rows.

    Two slices of one tensor differ in offset or size, and a tensor changed in place differs in version.
    """
    layout = (x.numel(), x.shape[-1]) if x.is_contiguous() else (tuple(x.shape), x.stride())
    return (x.untyped_storage()._cdata, x.storage_offset(), x._version, layout)
