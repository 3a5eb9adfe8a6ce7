"""What is known of one option, and the check of one value.

`quantlib.job.options` (a whole job) and `quantlib.job.rules` (one exception in a recipe) are tables made of
these. Front ends read help, kind, default and constraints from here and have none of their own.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from quantlib.errors import RecipeError

REQUIRED = dataclasses.MISSING

_KIND_WORDS = {str: "text", int: "a whole number", bool: "true or false", tuple: "a list of tables"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is known of one option beside its name, type and default.

    Attributes:
        help: One sentence for people.
        section: Heading under which forms and help texts show it.
        choices: The allowed values, where they can be listed.
        several: Whether a value may be several of the choices, with commas between them.
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        also_allowed: Values below the range with meanings of their own (explained in ``help``).
        in_identity: True when the value itself is part of a plan's identity. Addresses, texts and the
            machine are so only by what the plan makes of them (etags, digests, threads, kind of device).
    """

    help: str
    section: str
    choices: tuple[str, ...] | None = None
    several: bool = False
    minimum: int | None = None
    maximum: int | None = None
    also_allowed: tuple[int, ...] = ()
    in_identity: bool = False


def declare(
    default: Any,
    section: str,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    several: bool = False,
    minimum: int | None = None,
    maximum: int | None = None,
    also_allowed: tuple[int, ...] = (),
    in_identity: bool = False,
) -> Any:
    """A dataclass field that carries an `Option`; ``REQUIRED`` as default means there is none."""
    option = Option(
        help=help,
        section=section,
        choices=choices,
        several=several,
        minimum=minimum,
        maximum=maximum,
        also_allowed=also_allowed,
        in_identity=in_identity,
    )
    return field(default=default, metadata={"option": option})


def fields_of(table: type) -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """Name -> (dataclass field, its Option) of a table, in the order in which help texts show them."""
    return {f.name: (f, f.metadata["option"]) for f in dataclasses.fields(table)}


def kind_of(found: dataclasses.Field[Any]) -> type:
    """The type of a value that is given: ``str``, ``int``, ``bool`` or ``tuple`` (a list of tables)."""
    members = get_args(found.type) if isinstance(found.type, UnionType) else (found.type,)
    kind: Any = next(member for member in members if member is not NoneType)
    return get_origin(kind) or kind


def is_optional(found: dataclasses.Field[Any]) -> bool:
    """True when None is a value: it means that the plan decides."""
    return isinstance(found.type, UnionType) and NoneType in get_args(found.type)


def check_value(name: str, value: Any, found: dataclasses.Field[Any]) -> None:
    """Compare one value with what its table allows.

    Raises:
        RecipeError: Wrong type, not among the choices, or out of range; names option, value and what is
            allowed.
    """
    if value is None and is_optional(found):
        return
    option: Option = found.metadata["option"]
    kind = kind_of(found)
    if not _is_of_kind(value, kind):
        raise RecipeError(f"{name} must be {_KIND_WORDS[kind]}, found {value!r}", option=name)
    if isinstance(value, str) and not value.strip():
        raise RecipeError(f"{name} must not be empty; give a value or leave it out", option=name)
    if option.choices is not None:
        _check_choices(name, value, option.choices, several=option.several)
    if option.minimum is not None and isinstance(value, int):
        _check_range(name, value, option.minimum, option.also_allowed)
    if option.maximum is not None and isinstance(value, int) and value > option.maximum:
        raise RecipeError(f"{name} must be at most {option.maximum}, found {value!r}", option=name)


def names_in(value: str) -> list[str]:
    """The choices that a value of an option that takes several names.

    >>> names_in("gptq, awq")
    ['gptq', 'awq']
    """
    return [name.strip() for name in value.split(",")]


def _check_choices(name: str, value: Any, choices: tuple[str, ...], *, several: bool) -> None:
    named = names_in(value) if several else [value]
    if not set(named) <= set(choices):
        words = ", or several with commas between them" if several else ""
        raise RecipeError(f"{name} must be one of {', '.join(choices)}{words}, found {value!r}", option=name)
    if len(set(named)) < len(named):
        raise RecipeError(f"{name} names one of its values twice, found {value!r}", option=name)


def _check_range(name: str, value: int, minimum: int, also_allowed: tuple[int, ...]) -> None:
    if value < minimum and value not in also_allowed:
        extra = "".join(f" or {allowed}" for allowed in also_allowed)
        raise RecipeError(f"{name} must be at least {minimum}{extra}, found {value!r}", option=name)


def _is_of_kind(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)
    # bool is a subclass of int: `sequences = true` must not count as 1.
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
