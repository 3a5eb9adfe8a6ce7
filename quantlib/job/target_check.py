"""Whether the engine that is to serve an output would take it, known before any work."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from quantlib.job.options import JobOptions
from quantlib.job.parallel_splits import split_of, split_styles
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.job.serving import ServedLinear, Serving
from quantlib.job.targets import refuse_unserved
from quantlib.model.families import open_config
from quantlib.schemes import WeightScheme


def check_target(options: JobOptions, config: Mapping[str, Any], blocks: Sequence[BlockPlan]) -> None:
    """Refuse an output that the target of a request would reject.

    Args:
        options: The request; without a target nothing is refused.
        config: The values of the source's ``config.json``.
        blocks: What is quantized, and how.

    Raises:
        RecipeError: All that the engine would reject; see `quantlib.job.targets`.
    """
    if options.target is not None:
        refuse_unserved(options.target, serving_of(options, config, blocks))


def serving_of(options: JobOptions, config: Mapping[str, Any], blocks: Sequence[BlockPlan]) -> Serving:
    """What an engine gets to see of a plan."""
    text = open_config(config).get_text_config(decoder=True)
    # A latent attention has no heads of keys: they are made of what all heads share.
    kv_heads = None if getattr(text, "kv_lora_rank", None) else _number(text, "num_key_value_heads")
    linears = [linear for block in blocks for linear in block.linears]
    kept = [linear for linear in linears if linear.scheme is None]
    assert options.format is not None  # Chosen by `options_from`.
    return Serving(
        linears=_served(blocks, split_styles(text.base_model_tp_plan or {})),
        kept=tuple(x.name for x in kept if x.experts is None),
        kept_experts=tuple(x.name for x in kept if x.experts is not None),
        stores_each_expert=all(
            x.weight.tensor == f"{x.name}.weight" for x in linears if x.experts is not None
        ),
        format=options.format,
        tensor_parallel=options.tensor_parallel,
        heads=_number(text, "num_attention_heads"),
        kv_heads=kv_heads,
        dtype=_dtype(text),
        model_type=getattr(text, "model_type", None),
    )


def _served(blocks: Sequence[BlockPlan], styles: Mapping[str, str]) -> tuple[ServedLinear, ...]:
    names: dict[ServedLinear, list[str]] = {}
    for linear in (linear for block in blocks for linear in block.linears):
        if linear.scheme is not None:
            names.setdefault(_nameless(linear, linear.scheme, styles), []).append(linear.name)
    return tuple(
        dataclasses.replace(linear, name=alike[0], count=len(alike)) for linear, alike in names.items()
    )


def _nameless(linear: LinearPlan, scheme: WeightScheme, styles: Mapping[str, str]) -> ServedLinear:
    is_expert = linear.experts is not None
    return ServedLinear(
        name="",
        count=0,
        rows=linear.rows,
        columns=linear.columns,
        scheme=scheme,
        is_expert=is_expert,
        split=split_of(linear.path, styles, is_expert=is_expert),
    )


def _number(config: Any, name: str) -> int | None:
    # Some families have a list, of every block.
    found = getattr(config, name, None)
    return found if isinstance(found, int) else None


def _dtype(config: Any) -> str | None:
    found = getattr(config, "dtype", None)
    return None if found is None else str(found).removeprefix("torch.")
