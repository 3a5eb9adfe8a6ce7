"""Token rows of one source of text, or of a mix of several, and a record of what each of them gave.

Every source gives its rows as it would alone. With a seed its documents are shuffled by a number drawn from
the seed and its place, so that two sources that hold the same documents do not give the same rows. The rows
of a mix are then put into an order drawn from the seed, 0 included: each cell of sequences is a mix.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from quantlib.calibration.chat import template_digest
from quantlib.calibration.corpus import rows_digest, token_rows
from quantlib.calibration.documents import Documents, read_documents
from quantlib.errors import CorpusError
from quantlib.job.text_sources import TextRecord, TextSource, shared_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def mixed_rows(
    sources: Sequence[TextSource],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_column: str | None,
    num_sequences: int,
    sequence_length: int,
    seed: int = 0,
) -> tuple[torch.Tensor, tuple[TextRecord, ...]]:
    """Rows of token ids from all sources; those of a single one are `token_rows` of its documents.

    Args:
        sources: Where the text lies, and which share of the rows each gives.
        tokenizer: See `token_rows`.
        text_column: See `read_documents`.
        num_sequences: B, how many rows.
        sequence_length: T, tokens in a row.
        seed: Of the order of documents and of rows; with 0 documents come as they are.

    Returns:
        int32 [B, T], and a record of each source.

    Raises:
        RecipeError: A source would give no row.
        CorpusError: A source cannot be read or has too little text; names it.
        StorageError: Credentials were refused or the request failed.
    """
    counts = shared_out(sources, num_sequences)
    parts, records = [], []
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        documents = read_documents(source.uri, text_column)
        try:
            rows_BT = token_rows(
                documents,
                tokenizer,
                num_sequences=count,
                sequence_length=sequence_length,
                seed=seed if len(sources) == 1 else _seed_of_source(seed, number),
            )
        except CorpusError as error:
            if len(sources) == 1:
                raise
            raise CorpusError(
                f"{source.uri}: {error.message}", **{**error.facts, "uri": source.uri}
            ) from error
        parts.append(rows_BT)
        records.append(_record(source, rows_BT, documents, tokenizer))
    rows_BT = torch.cat(parts)
    if len(sources) > 1:
        order = list(range(num_sequences))
        random.Random(f"mix {seed}").shuffle(order)
        rows_BT = rows_BT[order]
    return rows_BT, tuple(records)


def _seed_of_source(seed: int, number: int) -> int:
    return random.Random(f"source {number} of {seed}").getrandbits(64) | 1 if seed else 0


def _record(
    source: TextSource, rows_BT: torch.Tensor, documents: Documents, tokenizer: "PreTrainedTokenizerBase"
) -> TextRecord:
    return TextRecord(
        uri=source.uri,
        weight=source.weight,
        sequences=len(rows_BT),
        digest=rows_digest(rows_BT),
        column=documents.column,
        template_digest=template_digest(tokenizer) if documents.has_chats else None,
    )
