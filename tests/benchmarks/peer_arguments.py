"""The command line of the peers' drivers: plain Python, as it runs in their environments too."""

import argparse
from pathlib import Path


def driver_arguments(description: str | None) -> argparse.Namespace:
    """What a driver is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="safetensors with input_ids, int32 [B, T]")
    parser.add_argument("--report", type=Path, required=True, help="CPU seconds by phase, JSON")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True, help="of the model")
    return parser.parse_args()
