"""What a serving engine gets to see of an output, and rules about it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantlib.schemes import WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLinear:
    """Quantized linears that are alike in all that rules look at.

    Attributes:
        name: Of the first of them.
        count: How many they are.
        rows: Out features.
        columns: In features.
        scheme: How they are quantized.
        is_expert: Whether they belong to routed experts.
        split: Which side of them is split: see `quantlib.job.parallel_splits`.
    """

    name: str
    count: int
    rows: int
    columns: int
    scheme: WeightScheme
    is_expert: bool
    split: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """An output and how it is to be served.

    Attributes:
        linears: All that is quantized; the first of the file comes first.
        kept: Names of linears of the blocks, experts apart, that rules keep as they are.
        kept_experts: Names of linears of routed experts that rules keep.
        stores_each_expert: Whether the source has a tensor for every linear of an expert, not one of all.
        format: Layout of the output.
        tensor_parallel: Devices that share every matrix.
        heads: Attention heads; None where the model does not say one number.
        kv_heads: Heads of keys and values, likewise; None too where keys are compressed (latent attention).
        dtype: Of the model, as ``config.json`` names it; None where it does not.
        model_type: Family, as ``config.json`` names it; None where it does not.
    """

    linears: tuple[ServedLinear, ...]
    kept: tuple[str, ...] = ()
    kept_experts: tuple[str, ...] = ()
    stores_each_expert: bool = True
    format: str
    tensor_parallel: int
    heads: int | None = None
    kv_heads: int | None = None
    dtype: str | None = None
    model_type: str | None = None


# Linears, or None where it is about the model; and what was found of them, in words.
Fault = tuple[ServedLinear | None, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRule:
    """One thing that an engine rejects.

    Attributes:
        wanted: What the engine takes, in words.
        source: Project, release and file that say so.
        faults: All that is not so.
        spares_kept: Whether linears that break it would be taken as they are in the source.
    """

    wanted: str
    source: str
    faults: Callable[[Serving], Iterable[Fault]]
    spares_kept: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What breaks one rule."""

    rule: EngineRule
    faults: tuple[Fault, ...]


def findings(rules: Sequence[EngineRule], serving: Serving) -> Iterator[Finding]:
    """The rules that are broken, and by what."""
    for rule in rules:
        if faults := tuple(rule.faults(serving)):
            yield Finding(rule=rule, faults=faults)


def of_linears(
    fault: Callable[[ServedLinear, int], str | None], *, formats: Sequence[str] | None = None
) -> Callable[[Serving], Iterator[Fault]]:
    """The faults of a rule that looks at one linear at a time.

    Args:
        fault: Of a linear and the number of devices: what is wrong in words, or None.
        formats: The layouts that the rule is about; None for all.
    """

    def faults(serving: Serving) -> Iterator[Fault]:
        if formats is not None and serving.format not in formats:
            return
        for linear in serving.linears:
            if words := fault(linear, serving.tensor_parallel):
                yield linear, words

    return faults
