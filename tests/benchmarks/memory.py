"""Does a worker's memory depend on the number of blocks? Two random Llamas that differ in nothing else.

    python tests/benchmarks/memory.py [--runner ray|inprocess] [--blocks 8 48]

Both are converted by one worker, and the anonymous memory of its process (RssAnon in /proc/PID/status; what
is mapped from files and from Ray's object store does not count) is noted twenty times a second. Printed: the
peaks, and how much a block more adds, as a share of a block's bytes. The promise is at most 1 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cpu_seconds import descendants

from tests.support.tiny_jobs import tiny_source, tiny_text

_POLL_S = 0.05
HIDDEN, INTERMEDIATE, HEADS = 1024, 2816, 16
PROMISED_SHARE = 0.01


def make_source(
    folder: Path,
    blocks: int,
    *,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    heads: int = HEADS,
    kv_heads: int | None = None,
    positions: int = 128,
    family: str = "llama",
    **settings: Any,
) -> int:
    """A random bf16 model of this many blocks, one shard a block; gives the bytes of a block."""
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    # One block by transformers, for config, tokenizer and names; the others are drawn here, shard by shard.
    shape |= {"num_key_value_heads": kv_heads or heads, "max_position_embeddings": positions}
    tiny_source(folder, family, num_hidden_layers=1, max_shard_size="10GB", **shape, **settings)
    (single,) = folder.glob("*.safetensors")
    tensors = load_file(single)
    single.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    in_block = {name: t for name, t in tensors.items() if ".layers.0." in name}
    outside = {name: t for name, t in tensors.items() if name not in in_block}
    weight_map: dict[str, str] = {}

    def save(shard: str, content: dict[str, torch.Tensor]) -> None:
        save_file(content, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, shard))

    save("model-outer.safetensors", outside)
    for block in range(blocks):
        drawn = {
            name.replace(".layers.0.", f".layers.{block}."): torch.randn_like(t) * 0.02 if t.ndim > 1 else t
            for name, t in in_block.items()
        }
        save(f"model-{block:03d}.safetensors", drawn)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": blocks}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in in_block.values())


def peak_anonymous_bytes(command: list[str], is_worker: str) -> int:
    """Largest RssAnon of any descendant whose command line holds ``is_worker`` while the command runs."""
    peak = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for pid in descendants(os.getpid()):
            try:
                if is_worker in (Path("/proc") / str(pid) / "cmdline").read_text(errors="replace"):
                    status = (Path("/proc") / str(pid) / "status").read_text()
                    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
                    peak = max(peak, int(kib) * 1024)
            except (OSError, StopIteration):
                continue
        time.sleep(_POLL_S)
    if process.returncode:
        sys.exit(process.returncode)
    return peak


def main() -> int:
    """Convert both models and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runner", choices=("ray", "inprocess"), default="ray")
    parser.add_argument("--blocks", type=int, nargs=2, default=(8, 48))
    arguments = parser.parse_args()
    is_worker = "ray::BlockWorker" if arguments.runner == "ray" else "-m\0quantlib"
    peaks, block_bytes = [], 0
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(prefix="quantmill-memory-") as name:
            root = Path(name)
            block_bytes = make_source(root / "source", blocks)
            text = tiny_text(root / "text.jsonl", documents=400)
            command = [str(Path(sys.executable).with_name("quantmill")), "quantize"]
            command += [str(root / "source"), str(root / "output"), "--calibration", str(text)]
            command += ["--evaluation", str(text), "--sequences", "8", "--sequence-length", "128"]
            command += ["--evaluation-sequences", "4", "--workers", "1", "--threads-per-worker", "1"]
            command += ["--runner", arguments.runner, "--checkpoint-every", "0"]
            peaks.append(peak_anonymous_bytes(command, is_worker))
        print(f"{blocks} blocks: peak {peaks[-1] / 2**20:.1f} MiB of anonymous memory in the worker")
    added = (peaks[1] - peaks[0]) / (arguments.blocks[1] - arguments.blocks[0])
    share = added / block_bytes
    print(f"a block has {block_bytes / 2**20:.1f} MiB; one more adds {added / 2**10:.1f} KiB, {share:.2%}")
    return 0 if share <= PROMISED_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
