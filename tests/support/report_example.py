"""A report as a run writes it, for the tests of its views."""

from typing import Any

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def example_report(num_blocks: int = 3) -> dict[str, Any]:
    """A finished GPTQ run with evaluation; every number that a view shows is different from the others."""
    return {
        "schema": 1,
        "tool": "quantmill 0.1.0",
        "identity": "ab" * 32,
        "source": "s3://models/SmolLM2-135M-Instruct",
        "output": "s3://models/out/SmolLM2-135M-Instruct-W4A16",
        "model_type": "llama",
        "options": {"scheme": "W4A16", "group_size": 64, "method": "gptq", "format": "gptq", "work": None},
        "started": "2026-03-01T00:10:00+00:00",
        "finished": "2026-03-01T00:14:12+00:00",
        "seconds": 252.3,
        "history": {"reused_units": []},
        "workers": 2,
        "threads_per_worker": 1,
        "device_kind": "cpu-avx512",
        "device_kinds": ["cpu-avx512"],
        "compute_dtype": "bfloat16",
        "runner": "ray",
        "evaluation": {
            "sequences": 32,
            "tokens": 16352,
            "perplexity_original": 14.374,
            "perplexity_quantized": 15.801,
            "ratio": 1.09928,
            "kl_divergence": 0.0942,
        },
        "calibration": {
            "sequences": 64,
            "tokens": 32768,
            "digest": "cd" * 32,
            "excluded_rows": [],
            "texts": [
                {
                    "uri": "s3://texts/chat.parquet",
                    "weight": "0.3",
                    "sequences": 19,
                    "digest": "12" * 32,
                    "column": "messages",
                    "template_digest": "34" * 32,
                }
            ],
        },
        "blocks": [_block(index) for index in range(num_blocks)],
        "shards": [
            {"name": "model-00001-of-00001.safetensors", "sha256": "ef" * 32, "size_bytes": 113_200_000}
        ],
        "bytes": {"source": 269_030_016, "output": 113_200_000, "read": 325_000_000, "written": 113_400_000},
        "stages": {
            "solve": {"seconds": 96.1, "cpu_seconds": 95.2, "calls": 210},
            "capture": {"seconds": 66.3, "cpu_seconds": 63.4, "calls": 60},
        },
        "timeline": {
            "workers": [_worker(num_blocks, late_s=0.0), _worker(num_blocks, late_s=2.5)],
            "busy_share": 0.7391,
            "hidden_storage_share": 0.8127,
        },
        "cpu_seconds": 298.4,
        "memory": {
            "planned": {"worker": {"idle": 600_000_000, "block": 28_000_000, "working": 640_000_000}},
            "most_slices": 1,
            "worker_peak_memory_bytes": [1_070_000_000, 1_230_000_000],
        },
        "fallbacks": [],
        "tensors": [
            {
                "state": "quantized",
                "reason": "to 4 bits, symmetric, groups of 64",
                "count": 217,
                "size_bytes": 212_336_640,
                "names": [f"model.layers.*.{kind}.weight" for kind in KINDS],
            },
            {
                "state": "copied",
                "reason": "norm, or another part after the blocks",
                "count": 1,
                "size_bytes": 1152,
                "names": ["model.norm.weight"],
            },
        ],
        "dropped": {},
        "versions": {"torch": "2.13.0+cpu"},
    }


def _worker(num_blocks: int, late_s: float) -> dict[str, Any]:
    """One block after the other, the next one read and the last one written beside the work on it."""
    step = 240 / num_blocks
    compute: list[list[Any]] = [["plan", -6.25, -1.5]]
    storage: list[list[Any]] = [["read", 0.5, 6.5]]
    for start in (8 + late_s + step * index for index in range(num_blocks)):
        compute.append(["capture", start, start + 0.3 * step])
        compute.append(["solve", start + 0.35 * step, start + 0.85 * step])
        storage.append(["read", start, start + 0.2 * step])
        storage.append(["write", start + 0.86 * step, start + 1.1 * step])
    rounded = ([[stage, round(a, 3), round(b, 3)] for stage, a, b in lane] for lane in (compute, storage))
    return {"began": -8.0 + late_s, **dict(zip(("compute", "storage"), rounded, strict=True))}


def _block(index: int) -> dict[str, Any]:
    linears = [
        {
            "name": f"model.layers.{index}.{kind}",
            "method": "gptq",
            "bits": 4,
            "relative_error": round(0.03 + 0.01 * index + 0.001 * position, 4),
            "damping_fraction": 0.01,
            "damping_attempts": 1,
            "tokens": 32768,
            "dead_columns": 0,
            "clipped_fraction": 0.002,
            "fallback": None,
        }
        for position, kind in enumerate(KINDS)
    ]
    return {
        "index": index,
        "relative_error": round(0.05 + 0.02 * index, 3),
        "cosine": 0.9951,
        "linears": linears,
        "seconds": {"capture": 2.1, "solve": 3.2},
    }
