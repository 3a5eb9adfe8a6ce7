"""The form of each shard of an output: safetensors, or the parts of a GGUF file."""

from functools import cached_property, partial
from typing import TYPE_CHECKING

from quantlib.calibration.corpus import load_tokenizer
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.writer import SAFETENSORS, ShardForm
from quantlib.job.plan import Plan, UnitPlan
from quantlib.packing import FORMATS, gguf_format
from quantlib.storage import Store

if TYPE_CHECKING:
    from quantlib.checkpoint.gguf_files.output import GgufOutput


class ShardForms:
    """Forms of the shards of a plan.

    Args:
        plan: Of the output.
        checkpoint: The source.
        store: Where it lies.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, store: Store) -> None:
        self._plan, self._checkpoint, self._store = plan, checkpoint, store

    def of(self, unit: UnitPlan) -> ShardForm:
        """The form of a unit's shard.

        Raises:
            UnsupportedModelError: It cannot say what the model is.
        """
        return SAFETENSORS if self._gguf is None else self._gguf.part(self._plan.units.index(unit))

    def num_bytes(self) -> int:
        """Bytes of all shards; takes seconds where there is a vocabulary in one.

        Raises:
            UnsupportedModelError: It cannot say what the model is.
            PackingError: A header would be too long.
        """
        return sum(self.of(unit).layout(unit.tensors).size_bytes for unit in self._plan.units)

    @cached_property
    def _gguf(self) -> "GgufOutput | None":
        if self._plan.options["format"] != gguf_format.NAME:
            return None
        # The gguf package and the readers of transformers take a while to import.
        from quantlib.checkpoint.gguf_files.output import GgufOutput

        return GgufOutput(
            self._checkpoint.config,
            self._plan.units,
            FORMATS[gguf_format.NAME].quantization_config(self._plan.schemes),
            partial(load_tokenizer, self._store, self._checkpoint),
        )
