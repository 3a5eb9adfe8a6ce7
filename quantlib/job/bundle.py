"""Outputs that are made from one reading of a source: what they share, and what each has of its own.

The source is read once, the original model runs once, and its statistics are summed once, for the input
groups of all; each output then has its linears solved, written and evaluated as its own plan says. The bytes
are those that each would have by itself. Outputs that have the same codes, in several layouts, are packed
from one solve.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlib.errors import PlanMismatchError, QuantError, RecipeError
from quantlib.job.plan import BlockPlan, LinearPlan, Plan
from quantlib.job.provenance import MACHINE_SETTINGS
from quantlib.job.several_formats import solvers_of
from quantlib.job.staged_output import PUBLICATION_OPTIONS
from quantlib.storage import normalize_uri, uri_name

# Options in which outputs of one reading may differ: where they go, how their codes are found, and what they
# are held to.
OWN_OPTIONS = (
    "output",
    "work",
    "scheme",
    "group_size",
    "method",
    "format",
    "embeddings",
    "portable_scales",
    "target",
    "tensor_parallel",
    "scale_search",
    "column_order",
    "descent_passes",
    "refit_scales",
    "outlier_columns",
    "outlier_weights",
    "tf32_feedback",
    "rules",
    *PUBLICATION_OPTIONS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Plans of outputs that are made together.

    Attributes:
        shared: What is read, run and summed: the plan itself where there is one output; else one whose blocks
            have the input groups of all, and whose work prefix is that of the first.
        outputs: Their plans.
        sums: Of every output and every block, the shared input group whose sums each of its own wants.
        solvers: Of every output the first one that has the same codes, zero points and scales.
    """

    shared: Plan
    outputs: tuple[Plan, ...]
    sums: tuple[tuple[tuple[int, ...], ...], ...]
    solvers: tuple[int, ...]

    def packed_with(self, output: int) -> list[Plan]:
        """The other outputs that have the codes of one."""
        alike = zip(self.outputs, self.solvers, strict=True)
        return [
            plan
            for number, (plan, solver) in enumerate(alike)
            if number != output and solver == self.solvers[output]
        ]

    @property
    def has_streams(self) -> bool:
        """Whether blocks are gone through one after the other: for data, or to read them once for all."""
        return self.shared.has_streams or len(self.outputs) > 1


def bundle_of(plans: Sequence[Plan]) -> Bundle:
    """Plans of one source, to be carried out together.

    Raises:
        RecipeError: They differ in what is to be done once for all of them; names the option.
        PlanMismatchError: Some were begun before, with other settings than the rest would have here.
    """
    first, *others = plans
    if not others:
        numbers = tuple(tuple(range(len(block.input_groups))) for block in first.blocks)
        return Bundle(shared=first, outputs=(first,), sums=(numbers,), solvers=(0,))
    for plan in others:
        _refuse_differences(first, plan)
    solvers = solvers_of(plans)
    _refuse_several_streams(plans, solvers)
    calibrated = next((plan for plan in plans if plan.calibration_digest is not None), first)
    blocks = tuple(_merged_block(alike) for alike in zip(*(plan.blocks for plan in plans), strict=True))
    shared = dataclasses.replace(calibrated, output=first.output, work=first.work, blocks=blocks)
    sums = tuple(
        tuple(_shared_groups(mine, all_) for mine, all_ in zip(plan.blocks, blocks, strict=True))
        for plan in plans
    )
    bundle = Bundle(shared=shared, outputs=tuple(plans), sums=sums, solvers=solvers)
    _refuse_other_sums(bundle)
    return bundle


def joined_refusal(refusals: Mapping[str, QuantError], outputs: Sequence[str]) -> QuantError:
    """One error for all outputs that were refused, by their names; of an only output its own.

    Args:
        refusals: Address of an output -> why it cannot be made; not empty.
        outputs: Addresses of all, with those that can be made.
    """
    if len(outputs) == 1:
        return next(iter(refusals.values()))
    reasons = ", ".join(f"{uri_name(uri)} ({error.message})" for uri, error in refusals.items())
    return RecipeError(
        f"{len(refusals)} of {len(outputs)} outputs cannot be made: {reasons}{_rest(refusals, outputs)}",
        outputs=list(refusals),
    )


def _rest(refusals: Mapping[str, QuantError], outputs: Sequence[str]) -> str:
    left = [uri_name(uri) for uri in outputs if uri not in refusals]
    return f"; without {'it' if len(refusals) == 1 else 'them'} {', '.join(left)} can be made" if left else ""


def refuse_other_values(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Make sure that two outputs of one reading differ in `OWN_OPTIONS` only.

    Args:
        first: Option values of the first output.
        other: Those of another one.

    Raises:
        RecipeError: Names the option.
    """
    for name, value in first.items():
        if name in OWN_OPTIONS or other[name] == value:
            continue
        before, now = normalize_uri(first["output"]), normalize_uri(other["output"])
        raise RecipeError(
            f"{now} wants {name} {_word(other[name])}, {before} {_word(value)}; what is"
            " read and run once must be the same for all recipes: choose one value, or convert one by itself",
            option=name,
        )


def _refuse_differences(first: Plan, plan: Plan) -> None:
    refuse_other_values(first.options, plan.options)
    if first.options["replay"] is not None:
        raise RecipeError("a replay repeats one run; leave out either replay or recipes", option="replay")
    for name in (*MACHINE_SETTINGS, "device_kind"):
        before, now = getattr(first, name), getattr(plan, name)
        if before != now:
            raise PlanMismatchError(
                f"{first.output} goes with {name} {before}, {plan.output} with {now}, as they were not begun"
                " together; finish the one that was begun by itself",
                setting=name,
            )


def _refuse_several_streams(plans: Sequence[Plan], solvers: Sequence[int]) -> None:
    """Quantized activations are those of one set of codes."""
    if plans[0].options["propagation"] == "original" or set(solvers) == {0}:
        return
    alike = [uri_name(plan.output) for plan, solver in zip(plans, solvers, strict=True) if solver == 0]
    others = [uri_name(plan.output) for plan, solver in zip(plans, solvers, strict=True) if solver != 0]
    raise RecipeError(
        f"several recipes need propagation original, found quantized: {', '.join(others)} would have other"
        f" codes than {', '.join(alike)} and need a run of their own; set propagation ="
        ' "original" (3 bits choose quantized unless told), or convert them by themselves',
        option="propagation",
    )


def _word(value: Any) -> str:
    return "unset" if value is None else str(value)


def _merged_block(blocks: Sequence[BlockPlan]) -> BlockPlan:
    """With every linear that any of them quantizes, and groups of all that read one tensor."""
    linears = tuple(_merged_linear(alike) for alike in zip(*(block.linears for block in blocks), strict=True))
    groups: list[tuple[str, ...]] = []
    for names in (group for block in blocks for group in block.input_groups):
        touching = [group for group in groups if set(group).intersection(names)]
        merged = dict.fromkeys((*(name for group in touching for name in group), *names))
        groups = [group for group in groups if group not in touching]
        groups.append(tuple(merged))
    order = {linear.name: number for number, linear in enumerate(linears)}
    groups = [tuple(sorted(group, key=order.__getitem__)) for group in groups]
    return dataclasses.replace(
        blocks[0],
        linears=linears,
        input_groups=tuple(sorted(groups, key=lambda group: order[group[0]])),
    )


def _merged_linear(linears: Sequence[LinearPlan]) -> LinearPlan:
    quantized = [linear for linear in linears if linear.scheme is not None]
    calibrated = [linear for linear in quantized if linear.method == "gptq"]
    found = next(iter([*calibrated, *quantized]), linears[0])
    return dataclasses.replace(found, corrects_bias=any(linear.corrects_bias for linear in linears))


def _shared_groups(mine: BlockPlan, merged: BlockPlan) -> tuple[int, ...]:
    numbers = {name: number for number, group in enumerate(merged.input_groups) for name in group}
    return tuple(numbers[group[0]] for group in mine.input_groups)


def _refuse_other_sums(bundle: Bundle) -> None:
    """Sums that biases are corrected by are others: whoever corrects none would not get its own bytes."""
    for plan, block, group, number in _calibrated_groups(bundle):
        shared = bundle.shared.blocks[block.index]
        if (group in block.centered_groups) != (number in shared.centered_groups):
            raise RecipeError(
                f"{plan.output} corrects biases of {shared.input_groups[number][0]} otherwise than another"
                " recipe; what is summed once must be the same for all: convert one by itself",
                option="correct_biases",
                linear=shared.input_groups[number][0],
            )


def _calibrated_groups(bundle: Bundle) -> Iterator[tuple[Plan, BlockPlan, int, int]]:
    """Of outputs that use sums: plan, block, input group and the shared one."""
    for plan, sums in zip(bundle.outputs, bundle.sums, strict=True):
        if plan.calibration_digest is not None:
            for block, numbers in zip(plan.blocks, sums, strict=True):
                for group, number in enumerate(numbers):
                    yield plan, block, group, number
