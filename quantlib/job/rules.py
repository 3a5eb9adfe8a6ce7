"""Exceptions by linear name: ordered rules, the first that matches decides.

A rule travels as plain data (a table in a recipe file, an object in the Prefect form). Its ``match`` is a
full linear name, a glob over full linear names, or ``re:`` and a regular expression that must cover the
whole name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quantlib.errors import RecipeError
from quantlib.job.option_table import REQUIRED, check_value, declare, fields_of
from quantlib.schemes import SCHEME_NAMES, WHOLE_ROW, WHOLE_TENSOR

REGEX_PREFIX = "re:"

_WHICH, _WHAT = "Which linears", "What they get"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One validated exception. ``None`` means: as the job's own option says."""

    match: str = declare(
        REQUIRED,
        _WHICH,
        'Full linear name, a glob such as "*.mlp.down_proj", or "re:" and a regular expression for it all.',
    )
    scheme: str | None = declare(
        None, _WHAT, "Number format, bits and symmetry of these weights.", choices=SCHEME_NAMES
    )
    group_size: int | None = declare(
        None,
        _WHAT,
        "Columns that share a scale; -1 for one scale a row, 0 for one a weight.",
        minimum=8,
        also_allowed=(WHOLE_ROW, WHOLE_TENSOR),
    )
    method: str | None = declare(
        None, _WHAT, "How the codes of these weights are found.", choices=("gptq", "rtn")
    )
    keep: bool = declare(False, _WHAT, "Leave these weights as they are in the source.")


def rule_from(values: Mapping[str, Any], position: int) -> Rule:
    """Validate one rule.

    Args:
        values: Plain values of the rule.
        position: 1-based place among the rules, for messages.

    Raises:
        RecipeError: Unknown key, wrong value, no ``match``, an invalid regular expression, or ``keep``
            together with settings it makes void.

    >>> rule_from({"match": "*.down_proj", "scheme": "W8A16"}, 1).scheme
    'W8A16'
    """
    known = fields_of(Rule)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RecipeError(
            f"unknown key {unknown[0]!r} in rule {position}; a rule has {', '.join(known)}",
            option="rules",
            rule=position,
            key=unknown[0],
        )
    if "match" not in values:
        raise RecipeError(
            f"rule {position} has no match: name the linears it is for", option="rules", rule=position
        )
    for name, value in values.items():
        check_value(f"{name} of rule {position}", value, known[name][0])
    rule = Rule(**values)
    _refuse_contradictions(rule, position)
    return rule


def rules_from(rules: Iterable[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Validate all rules of a job, in order.

    Raises:
        RecipeError: See `rule_from`.
    """
    return tuple(rule_from(values, position) for position, values in enumerate(rules, start=1))


def rule_values(rule: Rule) -> dict[str, Any]:
    """A rule as plain values, settings it leaves alone left out: equal rules give equal values.

    >>> rule_values(rule_from({"match": "lm_head", "keep": True, "scheme": None}, 1))
    {'match': 'lm_head', 'keep': True}
    """
    return {
        name: getattr(rule, name)
        for name, (found, _) in fields_of(Rule).items()
        if getattr(rule, name) != found.default
    }


def does_match(rule: Rule, linear_name: str) -> bool:
    """True when a rule is for a linear; upper and lower case differ.

    >>> does_match(Rule(match="*.self_attn.?_proj"), "model.layers.3.self_attn.q_proj")
    True
    >>> does_match(Rule(match=r"re:.*layers\\.[0-3]\\..*"), "model.layers.30.mlp.up_proj")
    False
    """
    if rule.match.startswith(REGEX_PREFIX):
        return re.fullmatch(rule.match.removeprefix(REGEX_PREFIX), linear_name) is not None
    # An exact name may hold characters that a glob reads otherwise.
    return rule.match == linear_name or fnmatchcase(linear_name, rule.match)


def _refuse_contradictions(rule: Rule, position: int) -> None:
    if rule.match.startswith(REGEX_PREFIX):
        try:
            re.compile(rule.match.removeprefix(REGEX_PREFIX))
        except re.error as error:
            raise RecipeError(
                f"match of rule {position} is not a valid regular expression ({error}): {rule.match!r}",
                option="rules",
                rule=position,
            ) from error
    settings = [name for name in ("scheme", "group_size", "method") if getattr(rule, name) is not None]
    if rule.keep and settings:
        raise RecipeError(
            f"rule {position} keeps its linears as they are and also sets {', '.join(settings)};"
            " remove one or the other",
            option="rules",
            rule=position,
        )
