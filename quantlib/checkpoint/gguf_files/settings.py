"""What the header of a GGUF file says of a model besides its tokenizer, from config.json.

Only what llama.cpp's graphs of the written architectures run is let through: what config.json asks for and a
header cannot say would change the model without a word.

Source: llama.cpp, convert_hf_to_gguf.py (set_gguf_parameters) and src/llama-model.cpp (load_hparams).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGUFWriter
from gguf.constants import LlamaFileType

from quantlib.checkpoint.gguf_files.rope_factors import divisors_of
from quantlib.errors import UnsupportedModelError
from quantlib.model.families import open_config

# Of the type of most blocks; what is not quantized is told tensor by tensor.
_FILE_TYPES = {
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
# Version of the layout of quantized blocks; GGML_QNT_VERSION of ggml.h.
_BLOCKS_VERSION = 2
# Of the architectures that are written, the activation of their gated MLP.
_ACTIVATION = "silu"
_FULL = "full_attention"


def write_settings(writer: GGUFWriter, config: Mapping[str, Any], block_type: str) -> None:
    """Add sizes, norms and rotary settings of a model.

    Args:
        writer: Of the file.
        config: The values of config.json.
        block_type: Of most quantized linears.

    Raises:
        UnsupportedModelError: config.json asks for what a header cannot say; see `refuse_unsaid`.
    """
    refuse_unsaid(config)
    values = open_config(config)
    head = getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[block_type])
    writer.add_quantization_version(_BLOCKS_VERSION)
    writer.add_vocab_size(values.vocab_size)
    writer.add_context_length(values.max_position_embeddings)
    writer.add_embedding_length(values.hidden_size)
    writer.add_block_count(values.num_hidden_layers)
    writer.add_feed_forward_length(values.intermediate_size)
    writer.add_head_count(values.num_attention_heads)
    writer.add_head_count_kv(values.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(values.rms_norm_eps)


def refuse_unsaid(config: Mapping[str, Any]) -> None:
    """Refuse what a header cannot say.

    Raises:
        UnsupportedModelError: An activation other than SiLU, a sliding window, rotary frequencies that are
            stretched otherwise than Llama 3's or turn a part of a head only.
    """
    values = open_config(config)
    layers: Sequence[str] = getattr(values, "layer_types", None) or ()
    # A llama header knows no window; of other families layer_types say whether it is used.
    is_windowed = getattr(values, "sliding_window", None) is not None and not layers
    faults = {
        f"the activation {values.hidden_act}": values.hidden_act != _ACTIVATION,
        "a sliding window": is_windowed or any(layer != _FULL for layer in layers),
        "rotary positions of a part of a head": _rope(config).get("partial_rotary_factor", 1.0) != 1.0,
        f"rotary positions of type {_rope(config)['rope_type']}": not _is_known_rope(config),
    }
    for found, is_fault in faults.items():
        if is_fault:
            raise UnsupportedModelError(
                f"gguf output cannot say that this {values.model_type} model has {found}; choose another"
                " format",
                model_type=values.model_type,
            )


def _is_known_rope(config: Mapping[str, Any]) -> bool:
    return _rope(config)["rope_type"] == "default" or divisors_of(_rope(config), 2) is not None


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return open_config(config).rope_parameters
