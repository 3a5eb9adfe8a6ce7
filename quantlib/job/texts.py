"""From the texts that a request names to token rows."""

import torch

from quantlib.calibration.corpus import load_tokenizer
from quantlib.calibration.mix import mixed_rows
from quantlib.checkpoint.index import Checkpoint
from quantlib.errors import RecipeError
from quantlib.job.options import JobOptions
from quantlib.job.text_sources import TextRecord, TextSource, text_sources
from quantlib.storage import open_store


def planned_rows(
    options: JobOptions, checkpoint: Checkpoint, *, calibrates: bool
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[TextRecord, ...]]]:
    """Token rows of a job, and where they come from; both under ``calibration`` and ``evaluation``.

    Args:
        options: The request.
        checkpoint: The source, whose tokenizer is used.
        calibrates: Whether any linear is calibrated.

    Returns:
        int32 [B, T] and records of the texts; what is not wanted is not there.

    Raises:
        RecipeError: Sequences are longer than the model's positions, or a source of a mix gives none.
        CheckpointError: There is no usable tokenizer.
        CorpusError: A text cannot be used.
        StorageError: Credentials were refused or the request failed.
    """
    limit = checkpoint.config.get("max_position_embeddings")
    if (calibrates or options.evaluation) and limit and options.sequence_length > limit:
        raise RecipeError(
            f"sequence_length must be at most the model's {limit} positions, found {options.sequence_length}",
            option="sequence_length",
        )
    wanted: dict[str, tuple[tuple[TextSource, ...], int, int]] = {}
    if calibrates and options.calibration is not None:
        wanted["calibration"] = (text_sources(options.calibration), options.sequences, options.seed)
    if options.evaluation is not None:
        whole = (TextSource(uri=options.evaluation, weight="1"),)
        wanted["evaluation"] = (whole, options.evaluation_sequences, 0)
    if not wanted:
        return {}, {}
    tokenizer = load_tokenizer(open_store(checkpoint.uri, options.storage_engine), checkpoint)
    drawn = {
        name: mixed_rows(
            sources,
            tokenizer,
            text_column=options.text_column,
            num_sequences=count,
            sequence_length=options.sequence_length,
            seed=seed,
        )
        for name, (sources, count, seed) in wanted.items()
    }
    return {name: rows_BT for name, (rows_BT, _) in drawn.items()}, {
        name: records for name, (_, records) in drawn.items()
    }
