"""The GPTQ solvers of other tools, called on a weight and what it reads, where they are installed.

Everything is as each tool has it by default but bits and groups: for llm-compressor a static activation order
and a damping of 0.01, for GPTQModel a group-aware order and 0.05.

R rows (out features), C columns (in features), N tokens, G groups.
"""

from collections.abc import Callable

import torch

# Weight and inputs, in bits and a group size -> a solver: from its call on time counts; gives the levels.
PreparedPeer = Callable[[], torch.Tensor]


def llm_compressor(
    weight_RC: torch.Tensor, x_NC: torch.Tensor, hessian_CC: torch.Tensor, *, bits: int, group_size: int
) -> PreparedPeer:
    """Its solver, with scales from the extremes of a group, as its observer finds them.

    Raises:
        ImportError: The tool is not here.
    """
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import (  # pyright: ignore[reportMissingImports]
        quantize_weight,
    )

    grid = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    arguments = QuantizationArgs(**grid, group_size=group_size, actorder=ActivationOrdering.STATIC)
    # It takes them as its working memory.
    weight_1RC, hessian_1CC = weight_RC.float()[None].clone(), hessian_CC[None] * (2 / len(x_NC))

    def solve() -> torch.Tensor:
        groups_RGC = weight_1RC[0].unflatten(1, (-1, group_size))
        scale_RG, zero_RG = calculate_qparams(groups_RGC.amin(-1), groups_RGC.amax(-1), arguments)
        levels_1RC, _, _ = quantize_weight(
            weight_1RC, hessian_1CC, scale_RG[None], zero_RG[None], None, arguments
        )
        return levels_1RC[0]

    return solve


def gptqmodel(
    weight_RC: torch.Tensor, x_NC: torch.Tensor, hessian_CC: torch.Tensor, *, bits: int, group_size: int
) -> PreparedPeer:
    """Its solver; it has summed its own Hessian of the inputs by then.

    Raises:
        ImportError: The tool is not here.
    """
    from gptqmodel.quantization import QuantizeConfig  # pyright: ignore[reportMissingImports]
    from gptqmodel.quantization.gptq import GPTQ  # pyright: ignore[reportMissingImports]

    linear = torch.nn.Linear(*reversed(weight_RC.shape), bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight_RC.clone(), requires_grad=False)
    settings = QuantizeConfig(
        bits=bits, group_size=group_size, sym=True, act_group_aware=True, damp_percent=0.05
    )
    solver = GPTQ(linear, settings)
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(x_NC[None], None)
    solver.finalize_hessian()

    def solve() -> torch.Tensor:
        return solver.quantize()[0]

    return solve


PEERS = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel}
