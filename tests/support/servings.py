"""What engines get to see of outputs, written by hand."""

from collections.abc import Mapping
from typing import Any

import pytest

from quantlib.errors import RecipeError
from quantlib.job.parallel_splits import HEADS, IN, OUT
from quantlib.job.serving import ServedLinear, Serving
from quantlib.job.targets import refuse_unserved
from quantlib.schemes import scheme_from_name


def served(
    name: str,
    rows: int,
    columns: int,
    split: str | None = None,
    *,
    scheme: str = "W4A16",
    group_size: int | None = 128,
    count: int = 1,
    is_expert: bool = False,
) -> ServedLinear:
    """Linears of ``rows`` x ``columns`` that are alike."""
    return ServedLinear(
        name=name,
        count=count,
        rows=rows,
        columns=columns,
        scheme=scheme_from_name(scheme, group_size),
        is_expert=is_expert,
        split=split,
    )


def llama(
    config: Mapping[str, Any],
    group_size: int | None,
    devices: int,
    *,
    scheme: str = "W4A16",
    layout: str = "compressed-tensors",
) -> Serving:
    """A model of ``config.json``'s sizes as an engine sees it, written down from what these sizes mean."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys = hidden // heads * kv_heads
    shapes = [
        ("q_proj", hidden, hidden, HEADS),
        ("k_proj", keys, hidden, HEADS),
        ("v_proj", keys, hidden, HEADS),
        ("o_proj", hidden, hidden, IN),
        ("gate_proj", inner, hidden, OUT),
        ("up_proj", inner, hidden, OUT),
        ("down_proj", hidden, inner, IN),
    ]
    return Serving(
        linears=tuple(served(*shape, scheme=scheme, group_size=group_size) for shape in shapes),
        format=layout,
        tensor_parallel=devices,
        heads=heads,
        kv_heads=kv_heads,
    )


def refusal(target: str, serving: Serving) -> RecipeError:
    """What a target says against an output."""
    with pytest.raises(RecipeError) as raised:
        refuse_unserved(target, serving)
    return raised.value
