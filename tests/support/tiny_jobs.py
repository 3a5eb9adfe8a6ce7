"""A tiny checkpoint with a tokenizer and text to go with it: whole jobs in seconds."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlib.job.options import JobOptions, options_from
from tests.support.tiny_models import save_tiny_checkpoint

WORDS = [f"w{number}" for number in range(93)]


def tiny_source(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A random bf16 checkpoint whose linears both formats can hold at groups of 32."""
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, **overrides}
    save_tiny_checkpoint(folder, family, dtype=torch.bfloat16, **settings)
    save_tiny_tokenizer(folder)
    return folder


def save_tiny_tokenizer(folder: Path) -> None:
    """A tokenizer of `WORDS`, whatever the family's own would be."""
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", "<s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)


def gguf_source(folder: Path, family: str = "llama", **settings) -> Path:
    """A tiny source whose tokenizer GGUF has a name for."""
    tiny_source(folder, family, **settings)
    for old in ("tokenizer.json", "tokenizer_config.json"):
        (folder / old).unlink()
    save_letter_tokenizer(folder)
    return folder


def save_letter_tokenizer(folder: Path) -> None:
    """Another one, of letters: some families' own class takes a byte-level BPE and nothing else."""
    letters = ["<|endoftext|>", "<s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789", "\u0120", "\u0120w"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u0120", "w")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)


def wide_source(folder: Path) -> Path:
    """A `tiny_source` of two blocks whose gate and up have more rows than a row tile on a CPU."""
    return tiny_source(folder, num_hidden_layers=2, intermediate_size=4640)


def tiny_text(path: Path, *, seed: int = 0, documents: int = 60) -> Path:
    """Documents of random words, as jsonl."""
    chosen = random.Random(seed)
    lines = [
        json.dumps({"text": " ".join(chosen.choices(WORDS, k=chosen.randint(5, 60)))})
        for _ in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_options(root: Path, **overrides: Any) -> JobOptions:
    """A request over `tiny_source` and `tiny_text` below ``root``, made on first use."""
    source, calibration, evaluation = root / "source", root / "calibration.jsonl", root / "evaluation.jsonl"
    if not source.exists():
        tiny_source(source)
        tiny_text(calibration, seed=1)
        tiny_text(evaluation, seed=2)
    values: dict[str, Any] = {
        "source": str(source),
        "output": str(root / "output"),
        "calibration": str(calibration),
        "evaluation": str(evaluation),
        "group_size": 32,
        "sequences": 10,
        "sequence_length": 32,
        "evaluation_sequences": 5,
        "threads_per_worker": 1,
        "device": "cpu",
        "runner": "inprocess",
    }
    return options_from({**values, **overrides})


def shard_digests(folder: Path) -> dict[str, str]:
    """File name -> sha256 of every shard."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".gguf")
    }
