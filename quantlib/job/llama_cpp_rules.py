"""What llama.cpp rejects of a GGUF file that can be written.

What its blocks cannot hold, the layout refuses (`quantlib.packing.gguf_format`); which models and tokenizers it
knows, the writer of the header does. Whole rows of blocks go to devices wherever they are cut, so that sides and
heads set no bound on how many share a model.
"""

from collections.abc import Iterator

from quantlib.job.serving import EngineRule, Fault, Serving

# GGML_CUDA_MAX_DEVICES.
_MAX_DEVICES = 16


def _too_many_devices(serving: Serving) -> Iterator[Fault]:
    if serving.tensor_parallel > _MAX_DEVICES:
        yield None, f"tensor_parallel {serving.tensor_parallel}"


RULES = (
    EngineRule(
        wanted=f"at most {_MAX_DEVICES} devices",
        source="llama.cpp of 2025, ggml/include/ggml-cuda.h and src/llama.cpp (llama_max_devices)",
        faults=_too_many_devices,
        spares_kept=False,
    ),
)
