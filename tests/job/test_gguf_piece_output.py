"""Whole jobs on sources with a SentencePiece tokenizer: the file has its tokens and is evaluated alike."""

from pathlib import Path

import pytest

from quantlib.calibration.corpus import load_tokenizer
from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.storage import open_store
from tests.support.tiny_jobs import tiny_options, tiny_text
from tests.support.tiny_pieces import piece_source

TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "w12  w3 w77 thoughts   with w8",
    "caf\u00e9 \u4e16\u754c\nnext\tline",
)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_output_has_the_tokens_of_its_source_and_the_reported_perplexity(tmp_path, family):
    piece_source(tmp_path / "source", family, **{"mistral": {"sliding_window": None}}.get(family, {}))
    for number, text in enumerate(("calibration", "evaluation"), start=1):
        tiny_text(tmp_path / f"{text}.jsonl", seed=number)
    options = tiny_options(tmp_path, format="gguf", embeddings="q8_0")
    report = quantize(options)
    store = open_store("file:///")
    assert verify_checkpoint(store, f"file://{options.output}", f"file://{options.source}").findings == ()
    (first,) = Path(options.output).glob("*-00001-of-*.gguf")
    ids = [
        [load_tokenizer(store, open_source(store, f"file://{place}"))(text).input_ids for text in TEXTS]
        for place in (options.source, first)
    ]
    assert ids[0] == ids[1]
    measured = evaluate_checkpoint(
        options.output,
        options.evaluation,
        text_column="text",
        sequences=5,
        sequence_length=32,
        threads=1,
        device="cpu",
    )
    assert measured["digest"] == report["evaluation"]["digest"]
    assert measured["perplexity"] == pytest.approx(report["evaluation"]["perplexity_quantized"], rel=1e-6)
