"""Linears that engines fuse when they serve a model, and which must therefore be quantized alike.

vLLM and SGLang make one matrix of the query, key and value projections of an attention, of gate and up of an
MLP, and one kernel call of all experts of a layer; each has one scheme. Which linears these are follows from
the structure: those that read the same tensor in the same module, and all routed experts of a block. That
takes in more than some engines fuse: the gates beside the projections of a linear attention, for example.
"""

from collections.abc import Iterable, Iterator, Mapping

from quantlib.errors import RecipeError
from quantlib.job.plan import BlockPlan
from quantlib.model.block_spec import BlockSpec
from quantlib.schemes import WeightScheme


def refuse_split_sets(spec: BlockSpec, block: BlockPlan) -> None:
    """Refuse rules that give linears of one fused set different schemes, or keep only some of them.

    Methods may differ: they leave no trace in the layout.

    Raises:
        RecipeError: Names two linears of a set and what each was given.
    """
    schemes = {linear.name: linear.scheme for linear in block.linears}
    for words, names in fused_sets(spec):
        first = names[0]
        other = next((name for name in names if schemes[name] != schemes[first]), None)
        if other is not None:
            raise RecipeError(
                f"{first} is to be {_said(schemes[first])} and {other} {_said(schemes[other])}; they are"
                f" {words}, which engines fuse, so they need one scheme: let the same rule match all of them",
                option="rules",
                linears=[first, other],
            )


def fused_sets(spec: BlockSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fused sets of a block: what they are, in words, and the names of their linears."""
    experts = {linear.name for linear in spec.linears if linear.expert is not None}
    for group in spec.input_groups:
        for module, names in by_module([name for name in group if name not in experts]).items():
            if len(names) > 1:
                yield f"linears of {module} that read the same input", names
    if len(experts) > 1:
        in_order = tuple(linear.name for linear in spec.linears if linear.name in experts)
        yield f"experts of block {spec.index}", in_order


def by_module(names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Module -> those of the linears that lie in it, in order."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        found[module] = (*found.get(module, ()), name)
    return found


def _said(scheme: WeightScheme | None) -> str:
    return "kept as it is" if scheme is None else str(scheme)
