"""The choice of entries, and what stands beside the codes of a row, against lists in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.outlier_weights import OutlierWeights, joined_weights, largest_entries

# Few values, so that many are equal; infinity is what squares may overflow to.
_VALUES = st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")])


@given(
    rows=st.lists(st.lists(_VALUES, min_size=6, max_size=6), min_size=1, max_size=4), count=st.integers(1, 6)
)
def test_largest_entries_are_those_of_a_stable_sort(rows, count):
    wanted = [sorted(sorted(range(6), key=lambda c, row=row: (-row[c], c))[:count]) for row in rows]
    assert largest_entries(torch.tensor(rows), count).tolist() == wanted


def test_weights_are_put_taken_and_erased_where_their_rows_have_them():
    kept = OutlierWeights(
        column_RM=torch.tensor([[0, 2], [1, 2]], dtype=torch.int32),
        weight_RM=torch.tensor([[5.0, 6.0], [7.0, 8.0]], dtype=torch.bfloat16),
    )
    given_RC = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert kept.taken_from(given_RC).tolist() == [[-4, 2, -3], [1, -5, -5]]
    assert kept.erase_from_(given_RC.clone()).tolist() == [[0, 2, 0], [1, 0, 0]]
    assert kept.put_into_(given_RC.clone()).tolist() == [[5, 2, 6], [1, 7, 8]]
    assert given_RC.tolist() == [[1, 2, 3]] * 2 and kept.num_weights == 4
    again = joined_weights([kept.rows(slice(0, 1)), kept.rows(slice(1, 2))])
    assert again.put_into_(given_RC).tolist() == [[5, 2, 6], [1, 7, 8]]
