"""Perplexity of a checkpoint, original or quantized, streamed block by block.

The model is never in memory: one block's weights, the activations of the rows, and at the end the head. Where
the checkpoint says that engines round inputs of linears, they are rounded here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from quantlib.calibration.corpus import load_tokenizer, rows_digest, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.checkpoint.decoded_block import read_block
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.job.stages import Progress
from quantlib.machine import batch_tokens, compute_dtype, default_threads, device_kind
from quantlib.model.rejoined_names import rejoined_names
from quantlib.model.skeleton import Skeleton, load_skeleton, run_block
from quantlib.schemes import ActivationScheme
from quantlib.stated_inputs import stated_inputs
from quantlib.steps import perplexity, score_streams
from quantlib.storage import Store, normalize_uri, open_store


def evaluate_checkpoint(
    uri: str,
    text: str,
    *,
    text_column: str | None,
    sequences: int,
    sequence_length: int,
    threads: int | None = None,
    device: str | None = None,
    storage_engine: str = "obstore",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Next-token perplexity inside rows of ``sequence_length`` tokens of a text.

    Args:
        threads: CPU threads; by default all cores.
        on_progress: Called before every block, and before the head.

    Returns:
        ``perplexity``, ``tokens``, ``sequences``, ``digest`` of the rows, ``model``; ``rounded_inputs``: what
        inputs were rounded to -> of how many linears; ``unknown_inputs``: the same of inputs that engines
        round in a way that is not known here, and that were left as they are.

    Raises:
        QuantError: The checkpoint or the text cannot be used.
    """
    torch.set_num_threads(threads or default_threads(1))
    uri = normalize_uri(uri)
    store = open_store(uri, storage_engine)
    # Levels as they are: rounded to the model's dtype they would be those of another checkpoint.
    checkpoint = open_source(store, uri, levels_dtype="F32")
    names = rejoined_names(checkpoint.config, list(checkpoint.tensors))
    skeleton = load_skeleton(checkpoint.config, names)
    rows_BT = token_rows(
        read_documents(text, text_column),
        load_tokenizer(store, checkpoint),
        num_sequences=sequences,
        sequence_length=sequence_length,
        seed=0,
    )
    kind = device_kind(device)
    place = torch.device("cuda" if kind.startswith("cuda") else "cpu")
    dtype = getattr(torch, compute_dtype(checkpoint.config, kind))
    cells = rows_BT.to(place).split(max(1, batch_tokens(kind) // sequence_length))
    stated = [stated_inputs(checkpoint, skeleton.block_spec(i)) for i in range(skeleton.num_blocks)]
    rounded = [block.rounded for block in stated]
    with torch.inference_mode():
        sums = _score(store, checkpoint, skeleton, rounded, cells, dtype, place, on_progress)
    tokens = sum(cell["tokens"] for cell in sums)
    return {
        "model": uri,
        "perplexity": perplexity(sum(cell["nll_original"] for cell in sums), tokens),
        "tokens": int(tokens),
        "sequences": len(rows_BT),
        "digest": rows_digest(rows_BT),
        "rounded_inputs": dict(Counter(str(scheme) for block in rounded for scheme in block.values())),
        "unknown_inputs": dict(Counter(words for block in stated for words in block.unknown)),
    }


def _score(
    store: Store,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    rounded: Sequence[Mapping[str, ActivationScheme]],
    cells: Sequence[torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[Progress], None],
) -> list[dict[str, float]]:
    """Run all cells through the model, one block at a time; the sums of `score_streams` for every cell.

    Args:
        rounded: Of every block, linear -> what its inputs are rounded to.
    """
    read = partial(read_tensors, store, checkpoint)
    outer = skeleton.build_outer(read(skeleton.prelude_tensors), dtype=dtype, device=device)
    embedded = [outer.embed(cell) for cell in cells]
    streams = [hidden for hidden, _ in embedded]
    # The last cell may hold fewer rows, so block inputs are kept by shape.
    inputs = {tuple(cell.shape): given for cell, (_, given) in zip(cells, embedded, strict=True)}
    del outer, embedded
    total = skeleton.num_blocks + 1.0
    for index in range(skeleton.num_blocks):
        on_progress(Progress(done=index, total=total, label=f"block {index + 1}/{skeleton.num_blocks}"))
        tensors = read_block(store, checkpoint, skeleton.block_spec(index))
        block = skeleton.build_block(index, tensors, dtype=dtype, device=device, inputs=rounded[index])
        for number, cell in enumerate(cells):
            streams[number] = run_block(block, streams[number], inputs[tuple(cell.shape)][index])
    on_progress(Progress(done=total - 1, total=total, label="head"))
    outer = skeleton.build_outer(read(skeleton.tail_tensors), dtype=torch.float32, device=device)
    return [score_streams(outer, cell, stream, None) for cell, stream in zip(cells, streams, strict=True)]
