"""A whole output as a split GGUF file: what all of its parts have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from quantlib.checkpoint.gguf_files import rope_factors
from quantlib.checkpoint.gguf_files.names import architecture_of, stored_names
from quantlib.checkpoint.gguf_files.settings import refuse_unsaid, write_settings
from quantlib.checkpoint.gguf_files.shard import KINDS, GgufPart
from quantlib.checkpoint.gguf_files.vocabulary import write_vocabulary
from quantlib.errors import UnsupportedModelError
from quantlib.job.plan import TensorSpec, UnitPlan
from quantlib.model.families import open_config
from quantlib.packing import gguf_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GgufOutput:
    """Parts of an output.

    Args:
        config: The values of the source's config.json.
        units: Of the job; each is a part.
        quantization: ``quantization_config`` of the output.
        load_tokenizer: Gives the source's tokenizer.

    Raises:
        UnsupportedModelError: The architecture, a tensor, its dtype or a setting has no name in GGUF.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        units: Sequence[UnitPlan],
        quantization: Mapping[str, Any],
        load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    ) -> None:
        self._architecture = architecture_of(config)
        refuse_unsaid(config)
        self._config, self._units, self._load_tokenizer = config, units, load_tokenizer
        self._block_type = str(quantization["format"])
        specs = [spec for unit in units for spec in unit.tensors]
        _refuse_other_dtypes(specs)
        planned = [spec.name for spec in specs]
        # Blocks stand where the weight would.
        weights = {name: _weight(name) for name in planned}
        places = stored_names(config, list(weights.values()))
        self._names = {name: places[weight] for name, weight in weights.items()}
        self._kinds = {
            name: _kind(quantization, name.removesuffix(gguf_format.SUFFIX))
            for name in planned
            if name.endswith(gguf_format.SUFFIX)
        }
        self._constants = _constants(config)

    def part(self, number: int) -> GgufPart:
        """The form of the unit with this position."""
        is_first = number == 0
        return GgufPart(
            number=number,
            count=len(self._units),
            num_tensors=len(self._names) + len(self._constants),
            architecture=self._architecture,
            names=self._names,
            kinds=self._kinds,
            describe=self._describe if is_first else None,
            constants=self._constants if is_first else {},
        )

    def _describe(self, writer: GGUFWriter) -> None:
        write_settings(writer, self._config, self._block_type)
        write_vocabulary(writer, self._load_tokenizer(), self._config)


def _refuse_other_dtypes(specs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        if spec.dtype not in KINDS and not spec.name.endswith(gguf_format.SUFFIX):
            raise UnsupportedModelError(
                f"gguf output holds tensors of {', '.join(KINDS)}, {spec.name} is {spec.dtype}; choose"
                " another format",
                tensor=spec.name,
            )


def _weight(name: str) -> str:
    if name.endswith(gguf_format.SUFFIX):
        return f"{name.removesuffix(gguf_format.SUFFIX)}.weight"
    return name


def _kind(quantization: Mapping[str, Any], linear: str) -> GGMLQuantizationType:
    scheme = gguf_format.scheme_of(quantization, linear)
    assert scheme is not None, "only quantized linears have blocks"
    return GGMLQuantizationType[gguf_format.type_of(scheme)]


def _constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    values = open_config(config)
    head = getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads
    divisors = rope_factors.divisors_of(values.rope_parameters, head // 2)
    return {} if divisors is None else {rope_factors.TENSOR: divisors}
