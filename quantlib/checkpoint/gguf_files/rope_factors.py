"""Llama 3's stretched rotary frequencies, which GGUF stores as divisors and transformers as four numbers.

transformers ignores the divisors, and would run such a model as if it were not stretched. Llama 3.1, 3.2 and
3.3 differ in the factor alone, so that it can be read off and the divisors worked out again from it: where
they are not the stored ones the file is refused.

Source: llama.cpp, convert_hf_to_gguf.py (LlamaModel.generate_extra_tensors).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlib.errors import CheckpointError

TENSOR = "rope_freqs.weight"
_THETA = 10000.0
_LOW, _HIGH, _POSITIONS = 1.0, 4.0, 8192
# Divisors are stored in fp32, from frequencies in fp32.
_TOLERANCE = 1e-4


def with_rope_factors(config: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """The values of a config.json in which the rotary parameters say what the divisors do.

    Args:
        config: What transformers makes of the file.
        divisors: fp32, one for each pair of a head's dims.

    Raises:
        CheckpointError: They are those of no Llama 3.
    """
    theta: float = (config.get("rope_parameters") or {}).get("rope_theta", _THETA)
    factor = float(divisors.max())
    wanted = _divisors(theta, factor, len(divisors))
    if config.get("model_type") != "llama" or not np.allclose(divisors, wanted, rtol=_TOLERANCE):
        raise CheckpointError(
            f"{TENSOR} stretches the rotary frequencies in a way that config.json cannot be written for;"
            " convert the file to safetensors",
            tensor=TENSOR,
        )
    if factor == 1.0:
        return dict(config)
    stretched = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _POSITIONS,
    }
    return {**config, "rope_parameters": stretched}


def divisors_of(parameters: Mapping[str, Any], pairs: int) -> np.ndarray | None:
    """What a file stores for rotary parameters, fp32 [pairs]; None where they are not those of a Llama 3.

    Args:
        parameters: ``rope_parameters`` of a config.json.
        pairs: Of a head's dims.
    """
    known = {
        "rope_type": "llama3",
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _POSITIONS,
    }
    if any(parameters.get(name) != value for name, value in known.items()):
        return None
    divisors = _divisors(parameters["rope_theta"], parameters["factor"], pairs)
    return np.array(divisors, dtype=np.float32)


def _divisors(theta: float, factor: float, pairs: int) -> list[float]:
    made = []
    for pair in range(pairs):
        turns = _POSITIONS / (2 * math.pi * theta ** (pair / pairs))
        smooth = min(1.0, max(0.0, (turns - _LOW) / (_HIGH - _LOW)))
        made.append(1 / ((1 - smooth) / factor + smooth))
    return made
