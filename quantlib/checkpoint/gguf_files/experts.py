"""Experts of a GGUF file: one tensor for all of a block, where Hugging Face checkpoints have one for each.

Their names are those that transformers' own conversion of such checkpoints reads. Families whose files name
experts otherwise than their modules are left out: nothing here knows those names.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from quantlib.errors import UnsupportedModelError

ENDING = "_exps.weight"
# Keys of the file that transformers does not take over, by the name in config.json.
SIZES = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_FAMILIES = ("qwen2_moe", "qwen3_moe")


def expert_names(
    model: PreTrainedModel, parameter: str, stored: str, shape: Sequence[int]
) -> tuple[str, ...]:
    """The name of each expert's matrix, in order.

    Args:
        model: On the meta device.
        parameter: The fused parameter that the tensor is, or is a part of.
        stored: Name in the file.
        shape: There.

    Raises:
        UnsupportedModelError: The family's names are not known, or the tensor does not fit the parameter.
    """
    fused = tuple(model.state_dict()[parameter].shape)
    if model.config.model_type in _FAMILIES:
        for converter in get_model_conversion_mapping(model):
            if isinstance(converter, WeightConverter) and parameter.endswith(converter.target_patterns[0]):
                patterns = converter.source_patterns
                if tuple(shape) != (fused[0], fused[1] // len(patterns), fused[2]):
                    break
                # Gate before up, as in the fused parameter.
                pattern = patterns[-1] if "_up_" in stored else patterns[0]
                prefix = parameter.removesuffix(converter.target_patterns[0])
                return tuple(prefix + pattern.replace("*", str(expert)) for expert in range(fused[0]))
    raise UnsupportedModelError(
        f"{stored} {list(shape)} holds the experts of a {model.config.model_type} model ({parameter},"
        f" {list(fused)}); from GGUF those of {', '.join(_FAMILIES)} are read: convert it to safetensors",
        tensor=stored,
    )
