"""Quantizes a checkpoint with GPTQModel, in an environment of its own; `peers.py` starts it.

GPTQ, symmetric, group-aware order and a damping of 0.05, which are its defaults, on rows of token ids that
come ready from a file. The head and the embeddings are kept.

B sequences, T positions.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from peer_arguments import driver_arguments


def main() -> None:
    """Load, quantize and save; the CPU seconds of each go to ``--report`` as JSON."""
    arguments = driver_arguments(__doc__)
    # Not at the top: this file must be importable where the tool is not installed.
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(arguments.threads)

    dtype = getattr(torch, arguments.dtype)
    ids_BT = load_file(arguments.rows)["input_ids"].long()
    settings = QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=True,
        act_group_aware=True,
        damp_percent=0.05,
    )
    model = GPTQModel.load(str(arguments.source), settings, device="cpu", dtype=dtype)
    rows = [{"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)} for ids_T in ids_BT]
    loaded = time.process_time()
    model.quantize(rows, batch_size=1)
    quantized = time.process_time()
    model.save(str(arguments.output))
    saved = time.process_time()
    spent = {"set_up": loaded, "quantize": quantized - loaded, "save": saved - quantized}
    arguments.report.write_text(json.dumps(spent))


if __name__ == "__main__":
    main()
