"""SmolLM2-135M straight from its GGUF file is the checkpoint that ``infra/demo_source.py`` makes of it."""

from pathlib import Path

import pytest
import torch

from quantlib.calibration.corpus import load_tokenizer
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.evaluation import evaluate_checkpoint
from quantlib.storage import open_store

DEMO = Path(__file__).resolve().parents[2] / ".demo"
FILE = DEMO / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = DEMO / "source" / "SmolLM2-135M-Instruct"

pytestmark = pytest.mark.slow


def test_tensors_tokens_and_perplexity_are_those_of_the_safetensors_checkpoint():
    store = open_store("file:///")
    gguf, dense = (open_source(store, f"file://{place}") for place in (FILE, FOLDER))
    assert set(gguf.tensors) == set(dense.tensors)
    for name in dense.tensors:
        pair = [read_tensors(store, checkpoint, [name])[name] for checkpoint in (gguf, dense)]
        assert torch.equal(*pair), name
    text = (DEMO / "text" / "evaluation.jsonl").read_text(encoding="utf-8")[:100_000]
    ids = [load_tokenizer(store, checkpoint)(text).input_ids for checkpoint in (gguf, dense)]
    assert ids[0] == ids[1]
    found = [
        evaluate_checkpoint(
            str(place),
            str(DEMO / "text" / "evaluation.jsonl"),
            text_column="text",
            sequences=2,
            sequence_length=256,
        )
        for place in (FILE, FOLDER)
    ]
    assert found[0]["digest"] == found[1]["digest"]
    # Levels of the file are evaluated as they are; those of the checkpoint were rounded to bf16.
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-3)
