"""A report as a finished run of two blocks leaves it, made up."""

from typing import Any


def linear_row(name: str, **values: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": "gptq",
        "bits": 4.25,
        "relative_error": 0.01,
        "damping_fraction": 0.01,
        "damping_attempts": 1,
        "tokens": 640,
        "dead_columns": 0,
        "clipped_fraction": 0.0,
        "fallback": None,
        **values,
    }


def sample_report(**changes: Any) -> dict[str, Any]:
    report = {
        "source": "s3://models/tiny",
        "output": "s3://models/tiny-w4a16",
        "model_type": "llama",
        "options": {"scheme": "W4A16", "group_size": 64, "method": "gptq", "format": "gptq"},
        "seconds": 75.2,
        "workers": 2,
        "history": {"reused_units": ["block-00000"]},
        "evaluation": {
            "perplexity_original": 14.37,
            "perplexity_quantized": 15.807,
            "ratio": 1.1,
            "kl_divergence": 0.125,
            "no_figures_because": None,
        },
        "blocks": [
            {
                "index": 0,
                "relative_error": 0.0123456,
                "cosine": 0.99991,
                "linears": [
                    linear_row("a", relative_error=0.02, damping_fraction=0.01),
                    linear_row("b", relative_error=0.05, damping_fraction=0.1, fallback="rtn"),
                ],
                "seconds": {"capture": 1.25, "solve": 2.5},
            },
            {
                "index": 1,
                "relative_error": None,
                "cosine": None,
                "linears": [linear_row("c", relative_error=None, damping_fraction=None)],
                "seconds": {},
            },
        ],
        "shards": [{"name": "model-00001-of-00001.safetensors", "sha256": "0", "size_bytes": 4}],
        "bytes": {"source": 4_000_000, "output": 1_000_000, "read": 0, "written": 0},
        "fallbacks": [{"linear": "b", "kind": "rtn", "detail": "no tokens"}],
    }
    return {**report, **changes}
