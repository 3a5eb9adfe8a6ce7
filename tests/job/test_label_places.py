"""Labels of a scatter plot keep off each other and off the marks while there is room."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from quantlib.job.label_places import Box, place_labels

FRAME = Box(left=0, top=0, right=700, bottom=400)


def covered(points, labels) -> float:
    marks = [Box(left=x - 5, top=y - 5, right=x + 5, bottom=y + 5) for x, y in points]
    among = sum(one.common_area(other) for one, other in combinations(labels, 2))
    return among + sum(mark.common_area(label) for mark in marks for label in labels)


def test_a_lone_label_stands_at_the_right_of_its_mark_or_at_the_left_where_the_frame_ends():
    (right,) = place_labels([(300.0, 200.0)], ["W4A16@64"], FRAME)
    assert right.left > 305
    (left,) = place_labels([(690.0, 200.0)], ["W4A16@64"], FRAME)
    assert left.right < 685


@given(
    x=st.floats(150, 550),
    y=st.floats(60, 340),
    steps=st.lists(st.tuples(st.floats(-12, 12), st.floats(-12, 12)), min_size=1, max_size=3),
)
def test_a_few_marks_that_nearly_touch_have_labels_apart(x, y, steps):
    points = [(x, y), *((x + right, y + down) for right, down in steps)]
    labels = place_labels(points, ["W4A16@128 x 1.102"] * len(points), FRAME)
    among = sum(one.common_area(other) for one, other in combinations(labels, 2))
    assert among == 0
    assert all(label.area - label.common_area(FRAME) < 1e-6 for label in labels)


def test_many_at_one_place_are_still_all_placed():
    points = [(300.0, 200.0)] * 20
    labels = place_labels(points, ["W4A16@64 x 1.1"] * 20, FRAME)
    assert len(labels) == 20
    assert covered(points[:6], labels[:6]) == 0
