"""A Llama checkpoint whose linears all have a bias, of zero: the same function, with room for a correction.

    python tests/benchmarks/biased.py SOURCE OUTPUT

By default a job on it chooses the codes it chooses on the source; what changes with ``--correct-biases`` is
what corrected biases are worth.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_SUFFIX = "_proj.weight"


def write_biased(source: Path, output: Path) -> int:
    """Copy a checkpoint and give every linear of its blocks a bias; gives how many.

    Raises:
        FileExistsError: ``output`` is there already.
    """
    shutil.copytree(source, output)
    config = json.loads((output / "config.json").read_text())
    config |= {"attention_bias": True, "mlp_bias": True}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    index = output / "model.safetensors.index.json"
    entries = json.loads(index.read_text()) if index.exists() else None
    count = 0
    for shard in sorted(output.glob("*.safetensors")):
        tensors = load_file(shard)
        weights = {name: tensor for name, tensor in tensors.items() if name.endswith(_SUFFIX)}
        for name, weight_RC in weights.items():
            bias = name.removesuffix("weight") + "bias"
            tensors[bias] = torch.zeros(len(weight_RC), dtype=weight_RC.dtype)
            count += 1
            if entries is not None:
                entries["weight_map"][bias] = shard.name
                entries["metadata"]["total_size"] += tensors[bias].nbytes
        save_file(tensors, shard, metadata={"format": "pt"})
    if entries is not None:
        index.write_text(json.dumps(entries, indent=2))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("output", type=Path, help="folder to make")
    arguments = parser.parse_args()
    print(f"{arguments.output}: {write_biased(arguments.source, arguments.output)} biases of zero")


if __name__ == "__main__":
    main()
