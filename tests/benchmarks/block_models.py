"""Models of which `block.py` makes one block: true shapes, random weights, nothing from a disk.

C columns (in features), D hidden, V vocabulary.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.simulation.config_shapes import shipped_config

_SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# For a warm-up: what is compiled for the blocks of that family, in seconds.
_TINY = {
    "llama": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "deepseek_v3": {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "n_routed_experts": 16,
        "moe_intermediate_size": 256,
    },
}
NAMES = ("llama-3.1-70b", "llama-3.1-405b", "deepseek-v3-experts", "smollm2")
_TRAINED_STD = 0.02
# DeepSeek-V3 routes to groups of experts first, each of two at least.
_EXPERT_GROUPS = 8
# So many different tokens for every feature of the hidden state: else the first Hessian would be singular.
_TOKENS_PER_FEATURE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockModel:
    """A model of one block.

    Attributes:
        name: With what was cut from the true block, if anything was.
        config: Values of a ``config.json`` with that block alone.
        num_alike: How many such blocks the true model has; None where this one is cut.
    """

    name: str
    config: dict[str, Any]
    num_alike: int | None


def block_model(name: str, *, inner: int | None = None, experts: int | None = None) -> BlockModel:
    """The model of a name.

    Args:
        name: One of `NAMES`.
        inner: Of a Llama: features inside attention and MLP at most; the hidden size stays.
        experts: Of DeepSeek-V3: routed experts at most.
    """
    if name == "deepseek-v3-experts":
        config, said = _with_experts(shipped_config("deepseek-v3"), experts)
        num_alike = config["num_hidden_layers"] - config["first_k_dense_replace"]
    else:
        config, said = _with_inner(_SMOLLM2 if name == "smollm2" else shipped_config(name), inner)
        num_alike = config["num_hidden_layers"]
    return BlockModel(name=name + said, config=_one_block(config), num_alike=None if said else num_alike)


def tiny_model(like: BlockModel) -> BlockModel:
    """A small block of the same family."""
    small = like.config | _TINY[like.config["model_type"]]
    if "head_dim" in small:
        small["head_dim"] = small["hidden_size"] // small["num_attention_heads"]
    return BlockModel(name="tiny", config=_one_block(small), num_alike=None)


def _with_experts(config: dict[str, Any], experts: int | None) -> tuple[dict[str, Any], str]:
    whole = config["n_routed_experts"]
    if experts is None or experts >= whole:
        return config, ""
    if experts % _EXPERT_GROUPS or experts < 2 * _EXPERT_GROUPS:
        raise SystemExit(f"--experts must be a multiple of {_EXPERT_GROUPS} from {2 * _EXPERT_GROUPS} on")
    return config | {"n_routed_experts": experts}, f", {experts} of {whole} experts"


def _with_inner(config: dict[str, Any], inner: int | None) -> tuple[dict[str, Any], str]:
    size = config["hidden_size"] // config["num_attention_heads"]
    config = config | {"head_dim": size}
    if inner is None or inner >= config["intermediate_size"]:
        return config, ""
    heads = max(1, min(config["num_attention_heads"], inner // size))
    keys = min(config["num_key_value_heads"], heads)
    cut = {"intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": keys}
    return config | cut, f", inner features cut to {inner}"


def _one_block(config: dict[str, Any]) -> dict[str, Any]:
    if "first_k_dense_replace" in config:
        config = config | {"first_k_dense_replace": 0}
    return config | {
        "num_hidden_layers": 1,
        "vocab_size": _TOKENS_PER_FEATURE * config["hidden_size"],
        "max_position_embeddings": 1 << 17,
        "dtype": "bfloat16",
    }


def stored_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint names of all tensors of a model of one block, as its authors publish it."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {"norm.weight": (hidden,)}
    block = {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    parts = _latent_parts(config) if config["model_type"] == "deepseek_v3" else _llama_parts(config)
    block |= {f"{name}.weight": shape for name, shape in parts.items()}
    if config["model_type"] == "deepseek_v3":
        block["mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
    shapes |= {f"layers.0.{name}": shape for name, shape in block.items()}
    ends = {} if config["tie_word_embeddings"] else {"lm_head.weight": (vocabulary, hidden)}
    return {f"model.{name}": shape for name, shape in shapes.items()} | ends


def random_tensor(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A bf16 tensor of a stored name, on the device; the same for the same name and kind of device.

    Norms are 1, matrices normal with the spread of trained ones. Of embeddings some columns are much larger
    than others, and neighbours are correlated, as of activations.
    """
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    if name.endswith("embed_tokens.weight"):
        rows, columns = shape
        return heavy_tailed(rows, column_sizes(columns, generator), generator).bfloat16()
    drawn = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
    return drawn.mul_(_TRAINED_STD)


def column_sizes(columns: int, generator: torch.Generator) -> torch.Tensor:
    """How large inputs are, fp32 [C]: log-normal."""
    return torch.exp(torch.randn(columns, device=generator.device, generator=generator))


def heavy_tailed(rows: int, size_C: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Inputs fp32 [rows, C] of such columns, neighbours correlated."""
    x_NC = torch.randn(rows, len(size_C), device=generator.device, generator=generator)
    x_NC *= size_C
    return x_NC + x_NC.roll(1, dims=1)


def _llama_parts(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    attention |= {"o_proj": (hidden, queries)}
    parts = {f"self_attn.{name}": shape for name, shape in attention.items()}
    return parts | _gated("mlp", hidden, config["intermediate_size"])


def _latent_parts(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, count = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank, inner = config["q_lora_rank"], config["kv_lora_rank"], config["moe_intermediate_size"]
    attention = {
        "q_a_proj": (q_rank, hidden),
        "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (nope + rope), q_rank),
        "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (nope + value), kv_rank),
        "o_proj": (hidden, heads * value),
    }
    parts: dict[str, tuple[int, ...]] = {f"self_attn.{name}": shape for name, shape in attention.items()}
    parts["mlp.gate"] = (count, hidden)
    parts |= _gated("mlp.shared_experts", hidden, inner * config["n_shared_experts"])
    for expert in range(count):
        parts |= _gated(f"mlp.experts.{expert}", hidden, inner)
    return parts


def _gated(place: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{place}.{name}": shape for name, shape in shapes.items()}
