"""Perplexity of a checkpoint, original or quantized, streamed block by block.

The model is never in memory: one block's weights, the activations of the rows, and at the end the head.
"""

from collections.abc import Callable
from typing import Any

import torch

from quantlib.calibration.corpus import load_tokenizer, rows_digest, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.checkpoint.decoder import DecodedCheckpoint
from quantlib.checkpoint.index import open_checkpoint
from quantlib.machine import computes_fast_in_bfloat16, default_threads, device_kind
from quantlib.model.skeleton import load_skeleton, run_block
from quantlib.steps import perplexity, score_streams
from quantlib.storage import normalize_uri, open_store


def evaluate_checkpoint(
    uri: str,
    text: str,
    *,
    text_column: str,
    sequences: int,
    sequence_length: int,
    threads: int | None = None,
    device: str | None = None,
    storage_engine: str = "obstore",
    on_block: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, Any]:
    """Next-token perplexity inside rows of ``sequence_length`` tokens of a text.

    Args:
        threads: CPU threads; by default all cores.
        on_block: Called with blocks done and blocks in all.

    Returns:
        ``perplexity``, ``tokens``, ``sequences``, ``digest`` of the rows, ``model``.

    Raises:
        QuantError: The checkpoint or the text cannot be used.
    """
    torch.set_num_threads(threads or default_threads(1))
    uri = normalize_uri(uri)
    store = open_store(uri, storage_engine)
    checkpoint = open_checkpoint(store, uri)
    weights = DecodedCheckpoint(store, checkpoint)
    skeleton = load_skeleton(weights.config, weights.names)
    rows_BT = token_rows(
        read_documents(text, text_column),
        load_tokenizer(store, checkpoint),
        num_sequences=sequences,
        sequence_length=sequence_length,
        seed=0,
    )
    kind = device_kind(device)
    place = torch.device("cuda" if kind.startswith("cuda") else "cpu")
    dtype = torch.bfloat16 if computes_fast_in_bfloat16(kind) else torch.float32
    cells = rows_BT.to(place).split(max(1, 4096 // sequence_length))
    with torch.inference_mode():
        outer = skeleton.build_outer(weights.read(skeleton.prelude_tensors), dtype=dtype, device=place)
        embedded = [outer.embed(cell) for cell in cells]
        streams = [hidden for hidden, _ in embedded]
        # The last cell may hold fewer rows, so block inputs are kept by shape.
        inputs = {tuple(cell.shape): given for cell, (_, given) in zip(cells, embedded, strict=True)}
        del outer, embedded
        for index in range(skeleton.num_blocks):
            tensors = weights.read(skeleton.block_spec(index).tensors)
            block = skeleton.build_block(index, tensors, dtype=dtype, device=place)
            for number, cell in enumerate(cells):
                streams[number] = run_block(block, streams[number], inputs[tuple(cell.shape)][index])
            on_block(index + 1, skeleton.num_blocks)
        outer = skeleton.build_outer(weights.read(skeleton.tail_tensors), dtype=torch.float32, device=place)
        sums = [
            score_streams(outer, cell, stream.float(), None)
            for cell, stream in zip(cells, streams, strict=True)
        ]
    tokens = sum(cell["tokens"] for cell in sums)
    return {
        "model": uri,
        "perplexity": perplexity(sum(cell["nll_original"] for cell in sums), tokens),
        "tokens": int(tokens),
        "sequences": len(rows_BT),
        "digest": rows_digest(rows_BT),
    }
