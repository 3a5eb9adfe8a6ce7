"""How AWQ and bitsandbytes checkpoints name the linears that are kept.

The readers agree on the keys, ``modules_to_not_convert`` and ``llm_int8_skip_modules``, and not on what they
mean. Of AWQ files vLLM, SGLang and AutoAWQ keep a module when an entry is found anywhere in its name; of
bitsandbytes files vLLM keeps it when an entry is one of the parts of its name between dots, or the beginning
of the name up to a dot. transformers takes an entry of either as a regular expression for the beginning of a
name, up to a dot, or as its end. Names differ, too. vLLM and SGLang ask for fused projections (``qkv_proj``)
and for all experts of a layer at once, and SGLang does not ask for the parts instead. vLLM and transformers
rename what names of some models begin with.

So every kept linear is listed by its full name, and beside it the outermost module around it in which
nothing is quantized. Full names end where the linear does: ``model.layers.1.mlp.gate`` says nothing of
``model.layers.10``. A module of which another name is a continuation is not listed, the next one inside is.

Left out, for SGLang: fused projections of a module in which something else is quantized, and what it calls
the modules of vision models.

Source: vLLM, quantization/utils/quant_utils.py (``is_layer_skipped``), quantization/bitsandbytes.py
(``is_layer_skipped_bnb``) and models/utils.py (``WeightsMapper``); SGLang, quantization/awq.py
(``is_layer_skipped_awq``); transformers 5.23, quantizers/quantizers_utils.py (``should_convert_module``).
"""

from collections.abc import Collection, Iterable, Sequence

from quantlib.errors import PackingError
from quantlib.packing.module_names import modules_above


def kept_entries(kept: Iterable[str], quantized: Collection[str], *, format_name: str) -> list[str]:
    """Entries that keep these linears and none of the quantized ones, by all readers' rules.

    Args:
        kept: Full names.
        quantized: Full names.
        format_name: For the message.

    Raises:
        PackingError: The name of a kept linear is a part of the name of a quantized one.

    >>> names = [f"model.layers.{i}.mlp.{n}" for i in (1, 10) for n in ("up", "down")]
    >>> kept_entries([*names[:2], "lm_head"], names[2:], format_name="awq")
    ['model.layers.1.mlp', 'model.layers.1.mlp.up', 'model.layers.1.mlp.down', 'lm_head']
    """
    # One search in all names is far faster than one in each: experts make tens of thousands.
    everything = "\n".join(quantized)
    safe: dict[str, bool] = {}
    entries: dict[str, None] = {}
    for name in kept:
        if name in everything:
            other = next(other for other in quantized if name in other)
            raise PackingError(
                f"{format_name} checkpoints name kept linears by parts of names: {name} cannot be kept while"
                f" {other} is quantized; treat both alike by a rule, or use --format compressed-tensors",
                linear=name,
            )
        for module in modules_above(name):
            if module not in safe:
                safe[module] = module not in everything
            if safe[module]:
                entries[module] = None
                break
        entries[name] = None
    return list(entries)


def is_kept(entries: Sequence[str], name: str) -> bool:
    """Whether an entry is found anywhere in the name, as those read it who write such files."""
    return any(entry in name for entry in entries)
