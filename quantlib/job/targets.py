"""Engines that serve outputs: what each rejects, known before any work.

An engine is data: its name, the layout it reads best, and its rules. All that breaks one is said at once,
with what would do instead; that is tried against the same rules.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantlib.errors import RecipeError
from quantlib.grids.formats import CODEBOOKS, FLOAT_FORMATS, INTEGER
from quantlib.job import (
    bitsandbytes_rules,
    llama_cpp_rules,
    transformers_rules,
    vllm_float_rules,
    vllm_rules,
)
from quantlib.job.serving import EngineRule, Fault, ServedLinear, Serving, findings
from quantlib.schemes import (
    CODEBOOK_NAMES,
    FLOAT_NAMES,
    ROUNDED_INPUTS_NAMES,
    WHOLE_ROW,
    WeightScheme,
    has_own_groups,
    scheme_from_name,
)

DEFAULT_FORMAT = "compressed-tensors"
_GROUP_SIZES = (128, 64, 32, WHOLE_ROW)
_SCHEMES = ("W4A16", "W8A16", "W4A16_ASYM", "W8A16_ASYM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One serving engine, as far as it was read.

    Attributes:
        formats: Layouts whose rules are known, of integers whose inputs stay as they are.
        schemes: Names of other schemes whose rules are known.
        default_format: Layout of outputs for it, where nobody names one.
        rules: What it rejects.
    """

    default_format: str
    rules: tuple[EngineRule, ...]
    formats: tuple[str, ...]
    schemes: tuple[str, ...] = ()


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        default_format=DEFAULT_FORMAT,
        rules=(*vllm_rules.RULES, *vllm_float_rules.RULES),
        formats=(*vllm_rules.FORMATS, "bitsandbytes", "gguf"),
        schemes=(*FLOAT_NAMES, *ROUNDED_INPUTS_NAMES, *CODEBOOK_NAMES),
    ),
    "transformers": Engine(
        default_format=DEFAULT_FORMAT,
        rules=(*transformers_rules.RULES, bitsandbytes_rules.NO_EXPERTS),
        formats=("compressed-tensors", "gptq", "bitsandbytes"),
        schemes=(*FLOAT_NAMES, *ROUNDED_INPUTS_NAMES, *CODEBOOK_NAMES),
    ),
    "bitsandbytes": Engine(
        default_format="bitsandbytes",
        rules=bitsandbytes_rules.RULES,
        formats=("bitsandbytes",),
        schemes=CODEBOOK_NAMES,
    ),
    "llama.cpp": Engine(default_format="gguf", rules=llama_cpp_rules.RULES, formats=("gguf",)),
}
TARGETS = tuple(ENGINES)


def default_format(target: str | None, scheme: str) -> str:
    """The layout of an output where nobody names one.

    >>> default_format(None, "W4A16"), default_format(None, "NF4"), default_format("llama.cpp", "W4A16")
    ('compressed-tensors', 'bitsandbytes', 'gguf')
    """
    if target is not None:
        return ENGINES[target].default_format
    return "bitsandbytes" if scheme in CODEBOOK_NAMES else DEFAULT_FORMAT


def refuse_unserved(target: str, serving: Serving) -> None:
    """Refuse an output that an engine would reject.

    Raises:
        RecipeError: What the engine rejects of such an output is not known. Or, of every rule that is broken,
            what the engine takes, how many linears break it, one of them, and who says so; and what would do.
    """
    _refuse_unknown(target, serving)
    engine = ENGINES[target]
    broken = list(findings(engine.rules, serving))
    if not broken:
        return
    at_fault = [linear for found in broken for linear, _ in found.faults if linear is not None]
    ways = _remedies(engine, serving, at_fault)
    if all(found.rule.spares_kept for found in broken) and _are_spared(engine, serving, at_fault):
        ways.append("a rule that keeps these linears as they are")
    raise RecipeError(
        "\n".join(
            (
                f"{target} would not serve this output:",
                *(
                    f"- it takes {found.rule.wanted}; found {_described(found.faults)} ({found.rule.source})"
                    for found in broken
                ),
                _advice(ways),
            )
        ),
        option="target",
        target=target,
        findings=[
            {
                "wanted": found.rule.wanted,
                "source": found.rule.source,
                "linears": sum(linear.count for linear, _ in found.faults if linear is not None),
                "example": next((linear.name for linear, _ in found.faults if linear is not None), None),
            }
            for found in broken
        ],
    )


def _refuse_unknown(target: str, serving: Serving) -> None:
    engine = ENGINES[target]
    named = {scheme_from_name(name) for name in engine.schemes}
    schemes = [linear.scheme for linear in serving.linears if linear.scheme not in named]
    unknown = next((x for x in schemes if x.number != INTEGER or x.inputs is not None), None)
    if serving.format in engine.formats and unknown is None:
        return
    found = serving.format if unknown is None else unknown
    others = f", and of {', '.join(engine.schemes)}" if engine.schemes else ""
    raise RecipeError(
        f"what {target} rejects is known of integers in {' and '.join(engine.formats)} files"
        f"{others}; found {found}; leave target out, or choose one of these",
        option="target",
        target=target,
    )


def _are_spared(engine: Engine, serving: Serving, at_fault: Sequence[ServedLinear]) -> bool:
    """Whether an output that keeps linears as they are is taken; one that keeps all is none."""
    others = tuple(linear for linear in serving.linears if linear not in at_fault)
    kept = tuple(linear.name for linear in at_fault if not linear.is_expert)
    experts = tuple(linear.name for linear in at_fault if linear.is_expert)
    changed = dataclasses.replace(
        serving,
        linears=others,
        kept=(*serving.kept, *kept),
        kept_experts=(*serving.kept_experts, *experts),
    )
    return bool(others) and next(findings(engine.rules, changed), None) is None


def _described(faults: Sequence[Fault]) -> str:
    linear, words = faults[0]
    if linear is None:
        return words
    more = sum(other.count for other, _ in faults if other is not None) - 1
    return f"{words} ({linear.name}{f' and {more} more' if more else ''})"


def _advice(ways: Sequence[str]) -> str:
    return f"What would do instead: {'; or '.join(ways)}" if ways else "Nothing that can be set here would do"


def _remedies(engine: Engine, serving: Serving, at_fault: Sequence[ServedLinear]) -> list[str]:
    """The smallest changes of options, in words, after which no rule is broken."""
    formats = () if serving.format == engine.default_format else (engine.default_format,)
    schemes = (*_SCHEMES, *_alike(engine.schemes, at_fault))
    choices = itertools.product((None, *formats), (None, *schemes), (None, *_GROUP_SIZES), (False, True))
    by_size = itertools.groupby(sorted(choices, key=_num_changes), key=_num_changes)
    for _, alike in by_size:
        found = (_remedy(engine.rules, serving, at_fault, *choice) for choice in alike)
        if ways := [words for words in found if words is not None]:
            return ways
    return []


def _alike(names: Sequence[str], at_fault: Sequence[ServedLinear]) -> list[str]:
    """Those of schemes of floats that have as many bits as linears that are floats already."""
    bits = {linear.scheme.bits if linear.scheme.number in FLOAT_FORMATS else None for linear in at_fault}
    return [name for name in names if _is_float(name) and {scheme_from_name(name).bits} == bits]


def _is_float(name: str) -> bool:
    return scheme_from_name(name).number in FLOAT_FORMATS


def _num_changes(choice: tuple[object, ...]) -> int:
    return sum(bool(part) for part in choice)


def _remedy(
    rules: Sequence[EngineRule],
    serving: Serving,
    at_fault: Sequence[ServedLinear],
    layout: str | None,
    scheme: str | None,
    group_size: int | None,
    on_fewer: bool,
) -> str | None:
    """What a choice is called, if no rule is broken after it; on fewer devices on as many as possible."""
    if not all(_says_enough(linear.scheme, scheme, group_size) for linear in at_fault):
        return None
    changes = {linear: _changed(linear, scheme, group_size) for linear in at_fault}
    linears = tuple(changes.get(linear, linear) for linear in serving.linears)
    layout_then = layout or serving.format
    if not all(map(_has_whole_groups, changes.values())) or not _holds_codebooks(layout_then, linears):
        return None
    devices = range(serving.tensor_parallel - 1, 0, -1) if on_fewer else (serving.tensor_parallel,)
    for number in devices:
        changed = dataclasses.replace(serving, linears=linears, tensor_parallel=number, format=layout_then)
        if next(findings(rules, changed), None) is None:
            parts = (
                layout and f"format {layout}",
                scheme and f"scheme {scheme}",
                group_size and f"group_size {group_size}",
                on_fewer and f"tensor_parallel {number}",
            )
            return " with ".join(part for part in parts if part)
    return None


def _says_enough(asked: WeightScheme, scheme: str | None, group_size: int | None) -> bool:
    """Whether a choice names a group size where it must, and only where it may."""
    if scheme is not None and has_own_groups(scheme):
        return group_size is None
    if asked.number == INTEGER and asked.inputs is None:
        return True
    # What was asked for says nothing of groups.
    return (scheme is None) == (group_size is None)


def _changed(linear: ServedLinear, scheme: str | None, group_size: int | None) -> ServedLinear:
    if scheme is None and group_size is None:
        return linear
    if scheme is None:
        changed = dataclasses.replace(linear.scheme, group_size=group_size)
    else:
        own = None if has_own_groups(scheme) else linear.scheme.group_size
        changed = scheme_from_name(scheme, group_size or own)
    return dataclasses.replace(linear, scheme=changed)


def _has_whole_groups(linear: ServedLinear) -> bool:
    scheme = linear.scheme
    sizes = [scheme.group_size] if scheme.block_rows == 1 else []
    sizes += [] if scheme.inputs is None else [scheme.inputs.group_size]
    return all(size <= 0 or linear.columns % size == 0 for size in sizes)


def _holds_codebooks(layout: str, linears: Sequence[ServedLinear]) -> bool:
    return layout == "bitsandbytes" or all(linear.scheme.number not in CODEBOOKS for linear in linears)
