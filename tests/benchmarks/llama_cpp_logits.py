"""Logits and tokens of llama.cpp beside those of transformers, of tiny random models of every written family.

    python tests/benchmarks/llama_cpp_logits.py make FOLDER
    python tests/benchmarks/llama_cpp_logits.py compare FOLDER

The first makes models, their outputs in GGUF and what transformers says of the levels in them; the second
wants llama-cpp-python and numpy only, and prints a line for each output. llama.cpp rounds activations to 8
bits where it multiplies by blocks, and keys and values to fp16; transformers does not. So there is an
output with one linear in blocks and the rest in fp32, which shows a wrong rotation or order of rows, and
one with all in blocks.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama": ("llama", {}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "llama, pieces": ("llama", {"vocab_size": 384}),
    "mistral, pieces": ("mistral", {"vocab_size": 384, "sliding_window": None}),
    "qwen3-tied": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}
ONE_LINEAR = (
    {"match": "model.layers.1.mlp.down_proj", "scheme": "W8A16"},
    {"match": "*", "keep": True},
)
OUTPUTS = {
    "one": {"rules": ONE_LINEAR},
    "all": {"scheme": "W4A16", "embeddings": "q8_0"},
}
TEXTS = (
    "the quick brown fox jumps over 13 lazy dogs while nobody watches what word 42 is  wwww w w",
    "w12 w7  w88 w3   thoughts of the other dogs over there",
    "the",
)
# The tiny byte pairs have no tokens for these.
OTHER_TEXTS = ("caf\u00e9 \u4e16\u754c\nnext line\ttab",)
NUM_TOKENS = 64


def make(folder: Path) -> None:
    """Write models, outputs, ids and logits."""
    for name in MODELS:
        for output, changes in OUTPUTS.items():
            _make_one(folder / name, *MODELS[name], output, changes)


def _make_one(root: Path, family: str, settings: dict, output: str, changes: dict) -> None:
    import torch
    from transformers import AutoTokenizer

    from quantlib.checkpoint.reader import read_tensors
    from quantlib.checkpoint.source import open_source
    from quantlib.inprocess import quantize
    from quantlib.job.options import options_from
    from quantlib.storage import open_store
    from tests.support.tiny_jobs import save_letter_tokenizer
    from tests.support.tiny_models import save_tiny_checkpoint, tiny_config, tiny_model
    from tests.support.tiny_pieces import save_piece_tokenizer

    sizes = {**SIZES, **settings}
    if not root.exists():
        save_tiny_checkpoint(root / "source", family, dtype=torch.float32, **sizes)
        save_tokenizer = save_piece_tokenizer if "vocab_size" in settings else save_letter_tokenizer
        save_tokenizer(root / "source")
    values = {"source": str(root / "source"), "output": str(root / output), "format": "gguf", "method": "rtn"}
    quantize(options_from({**values, "runner": "inprocess", "device": "cpu", **changes}))
    store = open_store("file:///")
    checkpoint = open_source(store, f"file://{root / output}", levels_dtype="F32")
    model = tiny_model(tiny_config(family, **sizes))
    model.load_state_dict(read_tensors(store, checkpoint, list(checkpoint.tensors)), strict=False)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(root / "source")
    ids = torch.randint(3, 39, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    np.save(root / output / "logits.npy", logits)
    texts = TEXTS + (OTHER_TEXTS if "vocab_size" in settings else ())
    expected = {
        "ids": ids[0].tolist(),
        "texts": texts,
        "tokens": [tokenizer(text).input_ids for text in texts],
    }
    (root / output / "expected.json").write_text(json.dumps(expected))


def compare(folder: Path) -> None:
    """Print how far the logits are apart, and whether tokens are equal."""
    for name in MODELS:
        for output in OUTPUTS:
            print(f"{name} {output}: {_compared(folder / name / output)}", flush=True)


def _compared(folder: Path) -> str:
    import llama_cpp

    expected = json.loads((folder / "expected.json").read_text())
    first = min(folder.glob("*.gguf"))
    model = llama_cpp.Llama(str(first), n_ctx=NUM_TOKENS, logits_all=True, verbose=False, n_threads=1)
    tokens = [model.tokenize(text.encode(), add_bos=True, special=False) for text in expected["texts"]]
    model.eval(expected["ids"])
    found = np.array(model.scores[:NUM_TOKENS], dtype=np.float64)
    wanted = np.load(folder / "logits.npy").astype(np.float64)
    gap = math.sqrt(((found - wanted) ** 2).mean() / wanted.var())
    divergence = (np.exp(_log_shares(wanted)) * (_log_shares(wanted) - _log_shares(found))).sum(1).mean()
    same = "equal" if tokens == expected["tokens"] else f"{tokens}, not {expected['tokens']}"
    return f"relative error of logits {gap:.1e}, KL divergence {divergence:.1e} nats; tokens {same}"


def _log_shares(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("make", "compare"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"make": make, "compare": compare}[arguments.command](arguments.folder)
