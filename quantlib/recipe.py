"""Recipes: how a model is to be quantized, as a TOML file, and what that means for one linear.

A recipe holds options by the names of `quantlib.job.options` and ``[[rules]]`` by those of
`quantlib.job.rules`. It says how, never which model: source and output are given with the command, so that
one recipe serves many models.
"""

import dataclasses
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantlib.errors import RecipeError
from quantlib.grids.formats import INTEGER, PLAIN_SCALES, PORTABLE_SCALES
from quantlib.job.options import JobOptions, option_fields, refuse_unknown
from quantlib.job.rules import does_match, rules_from
from quantlib.schemes import WeightScheme, has_own_groups, scheme_from_name

NOT_IN_RECIPES = ("source", "output")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options a recipe file sets, as plain values for `options_from`.

    Keys are checked here; values are checked by `options_from`, after the command line has had its say.

    Raises:
        RecipeError: No such file, not TOML, an unknown key, or a source or output in it; names the file.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}", recipe=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid TOML: {error}", recipe=str(path)) from error
    try:
        refuse_unknown(values)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error.message}", recipe=str(path), **error.facts) from error
    for name in NOT_IN_RECIPES:
        if name in values:
            allowed = ", ".join(key for key in option_fields() if key not in NOT_IN_RECIPES)
            raise RecipeError(
                f"recipe {path} names a {name}; a recipe says how, the {name} is given with the command."
                f" It may set {allowed}",
                recipe=str(path),
                option=name,
            )
    return values


def rule_for(options: JobOptions, linear_name: str) -> tuple[str, WeightScheme] | tuple[None, None]:
    """Method and scheme of one linear: the first rule that matches, completed by the job's options.

    Args:
        options: The validated request.
        linear_name: Full module name, without ``.weight``.

    Returns:
        (method, scheme), or (None, None) when the linear is kept as it is.

    Raises:
        RecipeError: The rules are wrong (not after `options_from`).
    """
    rule = next((rule for rule in rules_from(options.rules) if does_match(rule, linear_name)), None)
    if rule is None:
        return options.method, _scheme_of(options, options.scheme, options.group_size)
    if rule.keep:
        return None, None
    name, group_size = rule.scheme or options.scheme, rule.group_size
    if group_size is None and not has_own_groups(name) and not has_own_groups(options.scheme):
        group_size = options.group_size
    return rule.method or options.method, _scheme_of(options, name, group_size)


def _scheme_of(options: JobOptions, name: str, group_size: int | None) -> WeightScheme:
    scheme = scheme_from_name(name, group_size)
    if options.portable_scales and (scheme.number, scheme.scales) == (INTEGER, PLAIN_SCALES):
        return dataclasses.replace(scheme, scales=PORTABLE_SCALES)
    return scheme


def refuse_idle_rules(
    options: JobOptions, linears: Collection[str], *, outside: Collection[str], others: Collection[str]
) -> None:
    """Refuse rules that would change nothing although somebody wrote them down.

    A rule that another one stands before is no such: the first match decides.

    Args:
        options: The validated request.
        linears: Names of the linears of all blocks.
        outside: Names of the linears outside the blocks, all of which are kept.
        others: Names of what else the model has (norms, routers), which is kept too.

    Raises:
        RecipeError: A rule matches nothing of the model, or asks to quantize what can only be kept.
    """
    for position, rule in enumerate(rules_from(options.rules), start=1):
        if any(does_match(rule, name) for name in linears):
            continue
        kept = next((name for name in (*outside, *others) if does_match(rule, name)), None)
        if kept is None:
            example = next(iter(linears), "none")
            raise RecipeError(
                f"rule {position} matches nothing in this model: {rule.match!r}; linears are named as in"
                f" {example}: correct the rule, or remove it",
                option="rules",
                rule=position,
            )
        if not rule.keep:
            what = "a linear outside the blocks" if kept in outside else "no linear of a block"
            raise RecipeError(
                f"rule {position} asks to quantize {kept}, which is {what}; only linears of blocks are"
                " quantized: remove the rule, or let it keep what it matches",
                option="rules",
                rule=position,
            )
