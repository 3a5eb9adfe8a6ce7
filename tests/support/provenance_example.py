"""A provenance file as it is stored, written by hand: what the front ends read when a run is repeated."""

import json
from pathlib import Path
from typing import Any

PROVENANCE: dict[str, Any] = {
    "schema": 5,
    "tool": "quantmill 0.1.0",
    "identity": "0" * 64,
    "model_type": "llama",
    "source": {
        "uri": "s3://models/tiny",
        "objects": [{"name": "model.safetensors", "size_bytes": 8, "etag": "x"}],
        "config_digest": "1" * 64,
        "header_digest": "2" * 64,
    },
    "output": "s3://models/tiny-w8",
    "options": {
        "given": {"scheme": "W8A16", "method": "rtn", "rules": [{"match": "*.o_proj", "keep": True}]},
        "effective": {
            "source": "s3://models/tiny",
            "output": "s3://models/tiny-w8",
            "work": "s3://models/tiny-work",
            "scheme": "W8A16",
            "group_size": 64,
            "method": "rtn",
            "rules": [{"match": "*.o_proj", "keep": True}],
            "calibration": None,
            "evaluation": "s3://texts/held-out.parquet",
            "evaluation_sequences": 5,
            "runner": "inprocess",
            "workers": 7,
            "threads_per_worker": 3,
            "device": "cpu",
            "worker_labels": "pool=a",
            "placement": "spread",
            "ray_address": "ray.example:6379",
            "storage_engine": "s3fs",
            "checkpoint_every": 4,
            "replay": None,
        },
    },
    "calibration": {"digest": None, "texts": []},
    "evaluation": {
        "digest": "3" * 64,
        "texts": [
            {
                "uri": "s3://texts/held-out.parquet",
                "weight": "1",
                "sequences": 5,
                "digest": "3" * 64,
                "column": "text",
                "template_digest": None,
            }
        ],
    },
    "machine": {
        "device_kind": "cpu-avx2",
        "device_kinds": ["cpu-avx2"],
        "threads": 3,
        "sequences_per_cell": 2,
        "sequences_per_batch": 1,
        "compute_dtype": "float32",
    },
    "format_version": "0.0",
    "versions": {"quantmill": "0.1.0", "torch": "2.0"},
    "shards": [],
}


def write_provenance(folder: Path, **changes: Any) -> Path:
    """Store it, with some of its top-level values changed; ``...`` removes one."""
    values = {name: value for name, value in {**PROVENANCE, **changes}.items() if value is not ...}
    path = folder / "quantmill_provenance.json"
    path.write_text(json.dumps(values))
    return path
