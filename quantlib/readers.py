"""Where the input of a block's linears is seen while the block runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A module whose input is watched.

    Attributes:
        name: For people: of a linear that reads this.
        path: Of the module, inside the block.
        experts: Path of the `quantlib.model.experts.Experts` it is in, which knows what tokens it is called
            with; None where it is called once with every token, in order.
        counts_own: Whether the rows count that are the module's own, as the router chose.
        extra_share: For what share of the tokens of a batch those rows count together that are run besides.
    """

    name: str
    path: str
    experts: str | None = None
    counts_own: bool = True
    extra_share: float = 0.0

    @property
    def family(self) -> tuple[str, str] | None:
        """What the same linears of all experts have in common; None for what is not one expert's."""
        inside, _, name = self.path.rpartition(".")
        return None if self.experts in (None, inside) else (str(self.experts), name)
