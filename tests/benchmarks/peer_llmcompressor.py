"""Quantizes a checkpoint with llm-compressor, in an environment of its own; `peers.py` starts it.

GPTQ, symmetric, static activation order and a damping of 0.01, which are its defaults, on rows of token ids
that come ready from a file. The head and the embeddings are kept.

B sequences, T positions.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from peer_arguments import driver_arguments


def main() -> None:
    """Load, quantize and save; the CPU seconds of each go to ``--report`` as JSON."""
    arguments = driver_arguments(__doc__)
    # Not at the top: this file must be importable where the tool is not installed.
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(arguments.threads)

    dtype = getattr(torch, arguments.dtype)
    ids_BT = load_file(arguments.rows)["input_ids"].long()
    model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=dtype)
    grid = {"num_bits": arguments.bits, "type": "int", "symmetric": True}
    grid |= {"strategy": "group", "group_size": arguments.group_size}
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": grid}},
        ignore=["lm_head"],
        actorder="static",
        dampening_frac=0.01,
    )
    rows: Any = [{"input_ids": ids_T} for ids_T in ids_BT]
    loaded = time.process_time()
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=1),
        recipe=recipe,
        num_calibration_samples=len(ids_BT),
        max_seq_length=ids_BT.shape[1],
    )
    quantized = time.process_time()
    model.save_pretrained(arguments.output, save_compressed=True)
    saved = time.process_time()
    spent = {"set_up": loaded, "quantize": quantized - loaded, "save": saved - quantized}
    arguments.report.write_text(json.dumps(spent))


if __name__ == "__main__":
    main()
