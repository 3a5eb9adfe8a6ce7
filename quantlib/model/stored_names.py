"""From which stored tensors each parameter of transformers' model is made, under the names the file has.

transformers renames tensors and fuses them while it loads (per-expert matrices become one 3-D parameter).
Its own rules are asked here, so published checkpoints keep their names and no family is written down.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantlib.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """What conversions ask of a model: shapes of its parameters before any module is replaced."""

    config: PretrainedConfig
    parameters: Mapping[str, torch.Tensor]

    def get_parameter(self, name: str) -> torch.Tensor:
        """The meta parameter of a name."""
        return self.parameters[name]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversion:
    """Parameters that transformers computes from stored tensors.

    Attributes:
        name: The first parameter it makes; a conversion that splits makes its siblings too.
        tensors: Stored names by the pattern they were matched with, in the order transformers collects them.
        converter: transformers' own.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]]
    converter: WeightConverter

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of all tensors it reads."""
        return tuple(name for names in self.tensors.values() for name in names)

    @property
    def leaves_fitting(self) -> bool:
        """Whether it depends on the shape of what is stored: what fits the parameter is left as it is."""
        return any(getattr(operation, "check_dims", False) for operation in self.converter.operations)

    def run(self, model: BuiltModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters it makes, by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.tensors.items():
            for name in names:
                converter.add_tensor(self.name, name, pattern, tensors[name])  # pyright: ignore[reportArgumentType]
        made = converter.convert(self.name, model=cast(Any, model), config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def pieces(self, model: BuiltModel, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors as views of the parameter they are fused into; empty when that cannot be known.

        transformers' reverse conversion, as used for saving, run on the meta parameter.

        Raises:
            CheckpointError: There are more or fewer stored tensors than the parameter has room for.
        """
        if self.leaves_fitting:
            return {}
        reverse: Any = self.converter.reverse_transform()
        collected: dict[str, Any] = {reverse.source_patterns[0]: [parameter]}
        patterns = {"source_patterns": reverse.source_patterns, "target_patterns": reverse.target_patterns}
        with _views_stay_views():
            for operation in reverse.operations:
                collected = operation.convert(
                    collected, **patterns, full_layer_name=self.name, model=model, config=model.config
                )
        views = {key: piece for key, piece in collected.items() if _shares_storage(piece, parameter)}
        if not views:
            return {}
        found: dict[str, torch.Tensor] = {}
        for source, target in zip(self.converter.source_patterns, reverse.target_patterns, strict=True):
            keys = (
                [target.replace("*", str(index)) for index in range(len(views))]
                if "*" in target
                else [target]
            )
            keys = [key for key in keys if key in views]
            names = self.tensors.get(source, ())
            _refuse_missing(self.name, keys, names)
            found |= {name: views[key] for key, name in zip(keys, names, strict=True)}
        return found


def _refuse_missing(parameter: str, keys: list[str], names: tuple[str, ...]) -> None:
    if len(keys) == len(names):
        return
    missing = [key for key in keys if not any(key in name for name in names)]
    raise CheckpointError(
        f"parameter {parameter} is made from {len(keys)} tensors, the checkpoint stores {len(names)} of them"
        f" (missing: {', '.join(missing[:3]) or 'none by name'});"
        " complete the checkpoint or correct config.json",
        tensor=parameter,
    )


class _ContiguousIsIdentity(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


@contextmanager
def _views_stay_views() -> Iterator[None]:
    with _ContiguousIsIdentity():
        yield


def _shares_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def parameters_made(conversion: Conversion) -> list[str]:
    """Names of all parameters that a conversion makes."""
    first, *_ = patterns = conversion.converter.target_patterns
    return [conversion.name.replace(first, pattern) for pattern in patterns]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNames:
    """How a file's tensors become a model's parameters.

    Attributes:
        renamed: Parameter name -> the one stored tensor that is it.
        conversions: Name of a (first) parameter -> what makes it from stored tensors.
    """

    renamed: Mapping[str, str]
    conversions: Mapping[str, Conversion]


def find_stored_names(model: PreTrainedModel, tensor_names: Collection[str]) -> StoredNames:
    """Match stored names with the parameters of transformers' model, as its from_pretrained does.

    Args:
        model: As transformers builds it, on the meta device.
        tensor_names: All stored names.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    renamed: dict[str, str] = {}
    collected: dict[str, dict[str, list[str]]] = {}
    # transformers' order: it decides which expert is which.
    for name in sorted(tensor_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            continue
        if pattern is None:
            renamed.setdefault(target, name)
        else:
            collected.setdefault(target, {}).setdefault(pattern, []).append(name)
    conversions = {
        target: Conversion(
            name=target,
            tensors={pattern: tuple(names) for pattern, names in patterns.items()},
            converter=of_pattern[next(iter(patterns))],
        )
        for target, patterns in collected.items()
    }
    return StoredNames(renamed=renamed, conversions=conversions)
