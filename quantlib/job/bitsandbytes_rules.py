"""What bitsandbytes rejects of outputs, as transformers 5.23.0 runs it with bitsandbytes 0.50.2.

Its layout holds few schemes, which is refused before (`quantlib.packing.bitsandbytes_format`). Rules about
what becomes a quantized linear are read in the source of transformers.
"""

from collections.abc import Iterator

from quantlib.job.serving import EngineRule, Fault, ServedLinear, Serving, of_linears


def _no_experts(linear: ServedLinear, _devices: int) -> str | None:
    return "routed experts" if linear.is_expert else None


def _one_device(serving: Serving) -> Iterator[Fault]:
    if serving.tensor_parallel > 1:
        yield None, f"tensor_parallel {serving.tensor_parallel}"


NO_EXPERTS = EngineRule(
    wanted="files without quantized experts, which are fused there and stay as they are",
    source="transformers 5.23.0, integrations/bitsandbytes.py, replace_with_bnb_linear",
    faults=of_linears(_no_experts, formats=("bitsandbytes",)),
)
RULES = (
    NO_EXPERTS,
    EngineRule(
        wanted="one device a matrix, as far as is known here",
        source="what transformers does with packed tensors on several was not tried",
        faults=_one_device,
        spares_kept=False,
    ),
)
