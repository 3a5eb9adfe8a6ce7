"""Which linears the tensors of a source are weights and biases of, and under which names these are written.

The structure of the source's model says it. A source that has none that can be loaded is taken for one whose
linears are stored as they are, which their names tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantlib.checkpoint.index import Checkpoint
from quantlib.errors import QuantError
from quantlib.model.block_spec import LinearSpec
from quantlib.model.skeleton import load_skeleton
from quantlib.strided_view import StoredPart


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLinear:
    """A linear whose weight is a tensor of the source, or a part of one.

    Attributes:
        name: Under which its tensors are written.
        shape: Of its weight; [rows, columns] unless it is told by its name alone.
    """

    name: str
    shape: tuple[int, ...]


class SourceLinears:
    """The linears of a source, by its tensors.

    Args:
        source: Any checkpoint; its shards are not read.

    Attributes:
        error: Why the structure of its model is not known; None when it is.

    Cost: that of `load_skeleton`.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.error: QuantError | None = None
        self._source = source
        self._linears: dict[str, list[LinearSpec]] = {}
        self._biases: dict[str, dict[str, StoredPart]] = {}
        try:
            skeleton = load_skeleton(source.config, list(source.tensors))
        except QuantError as error:
            self.error = error
            return
        for index in range(skeleton.num_blocks):
            for linear in skeleton.block_spec(index).linears:
                self._add(linear)

    def weights(self, tensor: str) -> list[SourceLinear]:
        """The linears that a tensor of the source holds weights of."""
        if tensor in self._linears:
            return [
                SourceLinear(name=found.name, shape=(found.rows, found.columns))
                for found in self._linears[tensor]
            ]
        name = tensor.removesuffix(".weight")
        return [] if name == tensor else [SourceLinear(name=name, shape=self._source.tensors[tensor].shape)]

    def split_biases(self, tensor: str) -> Mapping[str, StoredPart]:
        """Biases that are parts of a tensor of the source, by the names they are written under."""
        return self._biases.get(tensor, {})

    def _add(self, linear: LinearSpec) -> None:
        if len(linear.weight_tensors) == 1:
            self._linears.setdefault(linear.weight_tensors[0], []).append(linear)
        if linear.bias is not None and not linear.has_own_bias:
            self._biases.setdefault(linear.bias.tensor, {})[f"{linear.name}.bias"] = linear.bias
