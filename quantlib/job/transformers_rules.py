"""What transformers rejects of outputs: release 5.23.0, with compressed-tensors 0.20.0 or optimum 2.3.0.

Rules about compressed-tensors were tried; those about gptq files, which it reads by optimum, are read in the
source, and bitsandbytes files are `quantlib.job.bitsandbytes_rules`.

Of compressed-tensors files routed experts are unpacked as they are loaded, all by the first entry of
``config_groups``, and their inputs are never rounded.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from quantlib.grids.formats import DIVIDED_SCALES, FLOAT_FORMATS, INTEGER, POWER_SCALES
from quantlib.job.serving import EngineRule, Fault, ServedLinear, Serving, of_linears
from quantlib.schemes import WeightScheme

_WITH_COMPRESSED_TENSORS = "transformers 5.23.0 with compressed-tensors 0.20.0, tried"
_EXPERTS = f"{_WITH_COMPRESSED_TENSORS}; integrations/compressed_tensors.py, CompressedTensorsDequantize"
_FORMAT = "compressed-tensors"
_OWN_SCALES = (POWER_SCALES, DIVIDED_SCALES)
# Experts of theirs become linears where a file is quantized, and only there.
_WITH_LINEARS_OF_EXPERTS = ("llama4", "llama4_text")
_WITH_OPTIMUM = "optimum 2.3.0, optimum/gptq/quantizer.py, convert_model"


def _symmetric(linear: ServedLinear, _devices: int) -> str | None:
    return None if linear.scheme.is_symmetric else str(linear.scheme)


def _no_experts(linear: ServedLinear, _devices: int) -> str | None:
    return "routed experts" if linear.is_expert else None


def _no_rounding_experts(linear: ServedLinear, _devices: int) -> str | None:
    rounds_inputs = linear.scheme.inputs is not None
    return str(linear.scheme) if linear.is_expert and rounds_inputs else None


def _unpacked_experts(linear: ServedLinear, _devices: int) -> str | None:
    scheme = linear.scheme
    is_mxfp8 = scheme.bits == 8 and scheme.scales == POWER_SCALES
    is_other = is_mxfp8 or scheme.scales == DIVIDED_SCALES or scheme.block_rows > 1
    return str(scheme) if linear.is_expert and is_other else None


def _experts_as_the_first(serving: Serving) -> Iterator[Fault]:
    if serving.format != _FORMAT or not serving.stores_each_expert:
        return
    first = serving.linears[0].scheme
    for linear in serving.linears:
        if linear.is_expert and _unpacked_by(linear.scheme) != _unpacked_by(first):
            yield linear, f"{linear.scheme} where the first linear has {first}"
    if serving.kept_experts and not _is_fp8(first):
        yield None, f"{len(serving.kept_experts)} experts kept as they are, such as {serving.kept_experts[0]}"


def _unpacked_by(scheme: WeightScheme) -> object:
    """What is equal of schemes of which one may be unpacked as if it were the other."""
    if _is_fp8(scheme):
        return scheme.number
    # Beside rounded inputs integers have another layout.
    return scheme if scheme.number == INTEGER else dataclasses.replace(scheme, inputs=None)


def _is_fp8(scheme: WeightScheme) -> bool:
    return scheme.number in FLOAT_FORMATS and scheme.bits == 8 and scheme.scales not in _OWN_SCALES


def _experts_by_name(serving: Serving) -> Iterator[Fault]:
    if serving.format != _FORMAT or serving.stores_each_expert:
        return
    if serving.model_type in _WITH_LINEARS_OF_EXPERTS:
        if serving.kept_experts:
            yield None, f"{len(serving.kept_experts)} kept as they are, such as {serving.kept_experts[0]}"
        return
    for linear in serving.linears:
        if linear.is_expert:
            yield linear, "routed experts of which a tensor holds several"


def _models_of_bfloat16(serving: Serving) -> Iterator[Fault]:
    if serving.format != _FORMAT or serving.dtype in (None, "bfloat16"):
        return
    for linear in serving.linears:
        if linear.scheme.scales in _OWN_SCALES and not linear.is_expert:
            yield linear, f"a model of {serving.dtype} in {linear.scheme}"


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
        faults=of_linears(_symmetric, formats=(_FORMAT,)),
    ),
    EngineRule(
        wanted="routed experts whose inputs stay as they are",
        source=f"{_EXPERTS}: those of integers are not loaded, inputs of others not rounded",
        faults=of_linears(_no_rounding_experts, formats=(_FORMAT,)),
    ),
    EngineRule(
        wanted="routed experts of integers, MXFP4, or FP8 by row or weight",
        source=f"{_EXPERTS}, which knows no other scales of experts; NVFP4 is loaded, without its divisor",
        faults=of_linears(_unpacked_experts, formats=(_FORMAT,)),
    ),
    EngineRule(
        wanted="routed experts in the scheme of the first linear of the file; kept ones only if that is FP8",
        source=f"{_EXPERTS} and get_experts_scheme",
        faults=_experts_as_the_first,
    ),
    EngineRule(
        wanted="routed experts of families that store each by itself; others kept, and those of Llama 4 not",
        source=f"{_WITH_COMPRESSED_TENSORS}: what is not found in the file stays as it was made;"
        " quantizers/base.py, MODULES_TO_PATCH_FOR_QUANTIZATION",
        faults=_experts_by_name,
    ),
    EngineRule(
        wanted="MXFP4, MXFP8 and NVFP4 in models of bfloat16",
        source=f"{_WITH_COMPRESSED_TENSORS}, which unpacks them to bfloat16",
        faults=_models_of_bfloat16,
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
