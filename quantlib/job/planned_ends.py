"""What is planned of the ends of a model, embedding and head, where they are rounded to nearest."""

from collections.abc import Mapping

from quantlib.checkpoint.index import Checkpoint
from quantlib.job.options import KEPT_EMBEDDINGS, JobOptions
from quantlib.job.plan import RoundedMatrix, TensorSpec
from quantlib.model.skeleton import Skeleton
from quantlib.packing import gguf_format
from quantlib.packing.gguf_rounding import SCHEME


def rounded_ends(options: JobOptions, skeleton: Skeleton, checkpoint: Checkpoint) -> dict[str, RoundedMatrix]:
    """Source tensor -> what it becomes, of embedding and head where they are rounded.

    Raises:
        PackingError: Rows of one fill no whole blocks.
    """
    if options.embeddings == KEPT_EMBEDDINGS:
        return {}
    found = {}
    for name in dict.fromkeys((*skeleton.prelude_tensors, *skeleton.tail_tensors)):
        entry, module = checkpoint.tensors[name], name.removesuffix(".weight")
        if len(entry.shape) == 2:
            gguf_format.check(module, *entry.shape, SCHEME)
            weight = TensorSpec(name=name, dtype=entry.dtype, shape=tuple(entry.shape))
            found[name] = RoundedMatrix(name=module, weight=weight, scheme=SCHEME)
    return found


def kept_heads(skeleton: Skeleton, checkpoint: Checkpoint, rounded: Mapping[str, RoundedMatrix]) -> list[str]:
    """Linears outside the blocks that stay as they are; one without a weight of its own is the embedding."""
    weights = {name: f"{name}.weight" for name in skeleton.outside_linears}
    return [
        name
        for name, weight in weights.items()
        if weight not in rounded and (weight in checkpoint.tensors or not rounded)
    ]


def blocks_spec(matrix: RoundedMatrix) -> TensorSpec:
    """The tensor that is written of a matrix."""
    rows, columns = matrix.weight.shape
    row_bytes = columns // matrix.scheme.group_size * gguf_format.block_bytes(matrix.scheme)
    return TensorSpec(name=f"{matrix.name}{gguf_format.SUFFIX}", dtype="U8", shape=(rows, row_bytes))
