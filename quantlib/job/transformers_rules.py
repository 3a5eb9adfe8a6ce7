"""What transformers rejects of outputs: release 5.23.0, with compressed-tensors 0.20.0 or optimum 2.3.0.

Rules about compressed-tensors were tried; those about gptq files, which it reads by optimum, are read in the
source.
"""

from collections import Counter
from collections.abc import Iterator

from quantlib.job.serving import EngineRule, Fault, ServedLinear, Serving, of_linears

_WITH_COMPRESSED_TENSORS = "transformers 5.23.0 with compressed-tensors 0.20.0, tried"
_WITH_OPTIMUM = "optimum 2.3.0, optimum/gptq/quantizer.py, convert_model"


def _symmetric(linear: ServedLinear, _devices: int) -> str | None:
    return None if linear.scheme.is_symmetric else str(linear.scheme)


def _no_experts(linear: ServedLinear, _devices: int) -> str | None:
    return "routed experts" if linear.is_expert else None


def _no_rounding_experts(linear: ServedLinear, _devices: int) -> str | None:
    rounds_inputs = linear.scheme.inputs is not None
    return str(linear.scheme) if linear.is_expert and rounds_inputs else None


def _one_scheme(serving: Serving) -> Iterator[Fault]:
    if serving.format != "gptq":
        return
    schemes: Counter[object] = Counter()
    for linear in serving.linears:
        schemes[linear.scheme] += linear.count
    (most, _), *_ = schemes.most_common(1)
    for linear in serving.linears:
        if linear.scheme != most:
            yield linear, f"{linear.scheme} besides {most}"
    if serving.kept:
        yield None, f"{len(serving.kept)} kept as they are, such as {serving.kept[0]}"


def _one_device(serving: Serving) -> Iterator[Fault]:
    if serving.tensor_parallel > 1:
        yield None, f"tensor_parallel {serving.tensor_parallel}"


RULES = (
    EngineRule(
        wanted="symmetric schemes; asymmetric ones only with CompressedTensorsConfig(dequantize=True), for"
        " which no target need be named, and asymmetric experts not at all",
        source=_WITH_COMPRESSED_TENSORS,
        faults=of_linears(_symmetric, formats=("compressed-tensors",)),
    ),
    EngineRule(
        wanted="routed experts whose inputs stay as they are, as far as is known here",
        source="compressed-tensors 0.20.0, quantization/utils/helpers.py, compute_dynamic_scales_and_zp:"
        " inputs of two dims get one scale for all tokens; experts were not tried",
        faults=of_linears(_no_rounding_experts, formats=("compressed-tensors",)),
    ),
    EngineRule(
        wanted="gptq files without quantized experts, which are no linears in transformers",
        source=_WITH_OPTIMUM,
        faults=of_linears(_no_experts, formats=("gptq",)),
    ),
    EngineRule(
        wanted="gptq files in which all linears of the blocks have one scheme",
        source=_WITH_OPTIMUM,
        faults=_one_scheme,
        spares_kept=False,
    ),
    EngineRule(
        wanted="one device a matrix, as far as is known here",
        source="what it does with packed tensors on several was not tried",
        faults=_one_device,
        spares_kept=False,
    ),
)
