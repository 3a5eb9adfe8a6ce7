"""A tiny tokenizer of SentencePiece's byte pairs, trained by SentencePiece itself."""

import io
import json
import random
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

from tests.support.tiny_jobs import WORDS, tiny_source

PIECES = 360
_ENGLISH = (
    "the quick brown fox jumps over the lazy dog",
    "nobody watches what the other dogs do over there",
    "what is wrong with this  sentence of words and thoughts",
)


def piece_source(folder: Path, family: str = "llama", **settings) -> Path:
    """A `tiny_source` with such a tokenizer, and as many embeddings and some more."""
    tiny_source(folder, family, vocab_size=384, **settings)
    (folder / "tokenizer.json").unlink()
    save_piece_tokenizer(folder)
    return folder


def save_piece_tokenizer(folder: Path) -> bytes:
    """Files of the tokenizer as transformers saves them; gives the content of its tokenizer.model."""
    chosen = random.Random(0)
    lines = [" ".join(chosen.choices(WORDS, k=12)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *_ENGLISH * 20]),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    return model.getvalue()
