"""What llama.cpp rejects of a GGUF file that can be written.

What its blocks cannot hold, the layout refuses (`quantlib.packing.gguf_format`); models and tokenizers that
it does not know, the writer of the header (`quantlib.checkpoint.gguf_files`). Devices share whole rows of
blocks, wherever they are cut, so that sides and heads set no bound.
"""

from collections.abc import Iterator

from quantlib.job.serving import EngineRule, Fault, Serving

# GGML_CUDA_MAX_DEVICES of ggml-cuda.h.
_MAX_DEVICES = 16


def _too_many_devices(serving: Serving) -> Iterator[Fault]:
    if serving.tensor_parallel > _MAX_DEVICES:
        yield None, f"tensor_parallel {serving.tensor_parallel}"


RULES = (
    EngineRule(
        wanted=f"at most {_MAX_DEVICES} devices",
        source="llama.cpp in llama-cpp-python 0.3.36, llama_max_devices",
        faults=_too_many_devices,
        spares_kept=False,
    ),
)
