"""Where the labels of a scatter plot stand so that they cover neither each other nor the marks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Of 12-unit text in a system font: a character on average, and a line.
_CHARACTER, _LINE = 6.8, 14.0
_GAP = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle of a picture; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def common_area(self, other: "Box") -> float:
        """Of what both cover.

        >>> Box(left=0, top=0, right=4, bottom=4).common_area(Box(left=3, top=2, right=9, bottom=3))
        1
        """
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0, width) * max(0, height)

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.bottom - self.top)


def place_labels(points: Sequence[tuple[float, float]], texts: Sequence[str], frame: Box) -> list[Box]:
    """A place for the label of every point, in their order.

    Each gets the nearest of some places around its point, later ones those that earlier ones left. Where all
    are taken, the one that covers least.

    Args:
        points: Centres of the marks.
        texts: Their labels.
        frame: What labels should not leave.
    """
    marks = [Box(left=x - 5, top=y - 5, right=x + 5, bottom=y + 5) for x, y in points]
    placed: list[Box] = []
    for (x, y), text in zip(points, texts, strict=True):
        taken = [*marks, *placed]
        places = list(_places(x, y, _CHARACTER * len(text)))
        # min takes the first of equals, which is the nearest.
        placed.append(min(places, key=lambda place: _covered(place, taken, frame)))
    return placed


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    for step in range(4):
        for sign in (-1, 1) if step else (1,):
            top = y - _LINE / 2 + sign * step * (_LINE + 1)
            for left in (x + _GAP, x - _GAP - width):
                yield Box(left=left, top=top, right=left + width, bottom=top + _LINE)


def _covered(place: Box, taken: Sequence[Box], frame: Box) -> float:
    outside = place.area - place.common_area(frame)
    return outside + sum(place.common_area(other) for other in taken)
