"""Hooks: what has to agree before an output is published.

A hook is a command, split into words as a shell would and started without one; ``@NAME`` stands for a command
that the operator of this installation wrote down. Forms take names only, as whoever fills them in must not
choose what runs on a worker. In a command ``{model}`` stands for a local folder that loads as any checkpoint,
``{output}`` for the address of the output and ``{report}`` for the report as a local JSON file.
``deployment:FLOW/NAME`` is a run of a Prefect deployment instead, which flows alone can begin.
"""

import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path

from quantlib.errors import RecipeError

# Whose value is the path of a TOML file: name -> command.
HOOKS_VARIABLE = "QUANTMILL_HOOKS"
NAME_PATTERN = r"^@[A-Za-z0-9][A-Za-z0-9._-]*$"
_DEPLOYMENT = "deployment:"
MODEL, OUTPUT, REPORT = "{model}", "{output}", "{report}"


def words_of(command: str) -> list[str]:
    """A command as a list of words.

    Raises:
        RecipeError: A quotation mark is left open, or there are no words.

    >>> words_of("smoke --text 'two words' {model}")
    ['smoke', '--text', 'two words', '{model}']
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RecipeError(f"hook {command!r} is no command: {error}", option="hook") from error
    if not words:
        raise RecipeError(f"hook {command!r} names no command; give one, or leave it out", option="hook")
    return words


def is_name(hook: str) -> bool:
    """Whether a hook stands for a command that the operator wrote down.

    >>> is_name("@smoke"), is_name("./smoke @model")
    (True, False)
    """
    return hook.startswith("@")


def deployment_in(command: str) -> str | None:
    """The deployment that a command stands for; None for a command that is one.

    >>> deployment_in("deployment:smoke-test/gpu"), deployment_in("smoke {model}")
    ('smoke-test/gpu', None)
    """
    return command.removeprefix(_DEPLOYMENT) if command.startswith(_DEPLOYMENT) else None


def check_hook(hook: str) -> None:
    """Refuse what is neither a name nor a command.

    Raises:
        RecipeError: See `words_of`; or it begins as a name and is none.
    """
    if not is_name(hook):
        words_of(hook)
    elif not re.fullmatch(NAME_PATTERN, hook):
        raise RecipeError(
            f"hook {hook!r} is no name: after @ come letters, digits, dots, dashes and underscores",
            option="hook",
        )


def configured_hooks(path: str | None) -> dict[str, str]:
    """The commands that the operator wrote down, by name; none where no file was named.

    Args:
        path: Of a TOML file of names and commands.

    Raises:
        RecipeError: It cannot be read, or holds something else; names the file.
    """
    if not path:
        return {}
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{HOOKS_VARIABLE}: {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{HOOKS_VARIABLE}: {path} is not valid TOML: {error}") from error
    for name, command in values.items():
        if not re.fullmatch(NAME_PATTERN, f"@{name}") or not isinstance(command, str):
            raise RecipeError(
                f"{HOOKS_VARIABLE}: {path} must map names to commands as text, found {name!r} = {command!r}"
            )
        words_of(command)
    return values


def command_of(hook: str, named: Mapping[str, str]) -> str:
    """The command that a hook stands for.

    Args:
        hook: A command, or the name of one.
        named: What `configured_hooks` found.

    Raises:
        RecipeError: Nobody wrote down a command of this name.
    """
    if not is_name(hook):
        return hook
    name = hook.removeprefix("@")
    if name not in named:
        known = f"it knows {', '.join(f'@{name}' for name in named)}" if named else "there is none"
        raise RecipeError(
            f"hook {hook} is not among those that {HOOKS_VARIABLE} names for this installation ({known})",
            option="hook",
        )
    return named[name]
