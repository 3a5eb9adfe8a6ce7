"""What a checkpoint says that engines round the inputs of its linears to."""

from dataclasses import dataclass

from quantlib.checkpoint.index import Checkpoint
from quantlib.errors import PackingError
from quantlib.model.block_spec import BlockSpec
from quantlib.packing import compressed_tensors_format
from quantlib.schemes import ActivationScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedInputs:
    """Of the linears of a block.

    Attributes:
        rounded: Linear -> what its inputs are rounded to.
        unknown: Of every linear whose inputs are rounded in a way that is not known here, that way.
    """

    rounded: dict[str, ActivationScheme]
    unknown: tuple[str, ...]


def stated_inputs(checkpoint: Checkpoint, spec: BlockSpec) -> StatedInputs:
    """What is said of the linears of a block.

    Args:
        checkpoint: As `quantlib.checkpoint.source.open_source` gives it; only of compressed-tensors' own is
            anything known.
        spec: Of the block.

    Raises:
        PackingError: Its config_groups cannot be read.
    """
    rounded: dict[str, ActivationScheme] = {}
    unknown: list[str] = []
    if checkpoint.source_format == compressed_tensors_format.NAME:
        for linear in spec.linears:
            try:
                scheme = compressed_tensors_format.inputs_of(checkpoint.quantization, linear.name)
            except PackingError as error:
                if "inputs" not in error.facts:
                    raise
                unknown.append(str(error.facts["inputs"]))
                continue
            if scheme is not None:
                rounded[linear.name] = scheme
    return StatedInputs(rounded=rounded, unknown=tuple(unknown))
