"""Names of the modules that a linear lies in."""


def modules_above(name: str) -> list[str]:
    """Outermost first.

    >>> modules_above("a.b.c")
    ['a', 'a.b']
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
