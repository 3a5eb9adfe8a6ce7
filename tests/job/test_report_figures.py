"""How busy lanes were, against cases counted by hand and against counting moment by moment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.job.report_figures import (
    busy_share,
    headlines,
    hidden_storage_share,
    history_sentences,
    lanes_sentence,
)
from tests.support.report_example import example_report


def worker(compute=(), storage=(), began=0):
    return {
        "began": began,
        "compute": [["solve", *span] for span in compute],
        "storage": [["read", *span] for span in storage],
    }


def test_shares_of_one_worker():
    workers = [worker(compute=[(0, 4), (6, 8)], storage=[(3, 7), (9, 10)])]
    assert busy_share(workers, 10) == pytest.approx(0.6)
    # Of 3-7 the seconds 3-4 and 6-7 are beside computation, of 9-10 none.
    assert hidden_storage_share(workers, 10) == pytest.approx(2 / 5)


def test_computation_of_another_worker_hides_nothing():
    workers = [worker(compute=[(0, 5)]), worker(compute=[(5, 10)], storage=[(0, 5)])]
    assert busy_share(workers, 10) == pytest.approx(0.5)
    assert hidden_storage_share(workers, 10) == 0.0


def test_what_overlaps_counts_once():
    workers = [worker(compute=[(0, 6), (2, 4), (5, 8)], storage=[(7, 9), (7, 9)])]
    assert busy_share(workers, 10) == pytest.approx(0.8)
    assert hidden_storage_share(workers, 10) == pytest.approx(0.5)


def test_only_the_time_of_the_run_counts():
    workers = [worker(compute=[(-5, 1), (9, 12)], storage=[(-3, 2)], began=-6)]
    assert busy_share(workers, 10) == pytest.approx(0.2)
    assert hidden_storage_share(workers, 10) == pytest.approx(0.5)


def test_worker_that_came_later_waited_for_nobody_before():
    workers = [worker(compute=[(0, 10)]), worker(compute=[(6, 8)], began=6)]
    assert busy_share(workers, 10) == pytest.approx(12 / 14)


def test_nothing_is_no_share():
    assert busy_share([], 10) is None
    assert busy_share([worker(began=11)], 10) is None
    assert hidden_storage_share([worker(compute=[(0, 5)])], 10) is None


spans = st.lists(st.tuples(st.integers(-5, 25), st.integers(-5, 25)).map(sorted).map(tuple), max_size=8)


@given(
    workers=st.lists(st.builds(worker, spans, spans, st.integers(-5, 25)), min_size=1, max_size=4),
    seconds=st.integers(1, 20),
)
def test_shares_equal_counting_second_by_second(workers, seconds):
    there = busy = storage = hidden = 0
    for one in workers:
        for second in range(max(0, one["began"]), seconds):
            computes, moves = (
                any(start <= second < end for _, start, end in one[lane]) for lane in ("compute", "storage")
            )
            there, busy = there + 1, busy + computes
            storage, hidden = storage + moves, hidden + (computes and moves)
    assert busy_share(workers, seconds) == (pytest.approx(busy / there) if there else None)
    assert hidden_storage_share(workers, seconds) == (pytest.approx(hidden / storage) if storage else None)


def test_sentence_tells_both_shares():
    assert lanes_sentence(example_report()) == (
        "Compute lanes were busy 73.9 % of the time; 81.3 % of the time spent on storage was hidden behind"
        " computation."
    )


def test_sentence_tells_what_there_is():
    report = example_report()
    report["timeline"]["hidden_storage_share"] = None
    assert lanes_sentence(report) == "Compute lanes were busy 73.9 % of the time."
    report["timeline"]["busy_share"] = None
    assert lanes_sentence(report) is None
    assert lanes_sentence({}) is None


@pytest.mark.parametrize(
    ("source", "output", "source_format", "note"),
    [
        (300, 200, "gguf", "1.50 times smaller"),
        (999, 998, "gguf", "about the same size"),
        (998, 999, "gguf", "about the same size"),
        (200, 300, "gguf", "1.50 times as large; the source is stored as gguf"),
        (200, 300, "safetensors", "1.50 times as large"),
        (200, 300, None, "1.50 times as large"),
    ],
)
def test_size_says_which_of_the_two_is_the_smaller(source, output, source_format, note):
    report = {"source_format": source_format, "bytes": {"source": source, "output": output}}
    (found,) = (headline for headline in headlines(report) if headline.name == "Size")
    assert (found.value, found.note) == (f"{source} B -> {output} B", note)


def test_history_tells_of_failed_factors_and_of_too_little_memory():
    report = example_report()
    assert history_sentences(report) == []
    failed = {"way": "blocked", "columns": 53248, "problems": {"library": "7 wrong entries"}}
    report["cholesky_checks"] = [None, {"way": "library", "columns": 53248, "problems": {}}, failed]
    report["memory"]["steps"] = {"cpu": 1, "emptied_cache": 1200}
    assert history_sentences(report) == [
        "Memory of a device did not suffice for linears that were solved on the CPU: 1",
        "Memory of a device did not suffice for linears that were solved once more: 1,200",
        "Worker 2 made factors in the way blocked, as library failed at 53,248 columns: 7 wrong entries",
    ]
