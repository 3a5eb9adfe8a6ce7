"""The table of policies: what is tried again, how long is waited, what stops."""

import pytest

from quantlib import errors
from quantlib.job import failures
from quantlib.job.failures import delay_s, policy_for, retrying


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (errors.TransientStorageError("x"), "retry"),
        (errors.ChecksumError("x"), "retry"),
        (errors.WorkerLostError("x"), "renew"),
        (errors.WorkerError("x"), "stop"),
        (errors.NoSpaceError("x"), "stop"),
        (errors.LeaseError("x"), "stop"),
        (errors.ObjectNotFoundError("x"), "stop"),
        (errors.CheckpointError("x"), "stop"),
        (errors.RecipeError("x"), "stop"),
        (ValueError("x"), "stop"),
        (None, "stop"),
    ],
)
def test_failures_every_kind_has_its_action(error, action):
    assert policy_for(error).action == action


def test_failures_delays_double_within_their_jitter_up_to_the_longest():
    policy = failures.Policy(action="retry", attempts=9, first_delay_s=2.0, max_delay_s=10.0)
    for attempt, whole in ((1, 2.0), (2, 4.0), (3, 8.0), (4, 10.0), (9, 10.0)):
        delays = [delay_s(policy, attempt) for _ in range(200)]
        assert min(delays) >= whole * (1 - failures.JITTER)
        assert max(delays) <= whole * (1 + failures.JITTER)
        assert max(delays) - min(delays) > whole / 4, "many workers would ask again together"


def _failing(times: int, error: Exception):
    calls = []

    def function(value: int) -> int:
        calls.append(value)
        if len(calls) <= times:
            raise error
        return value

    return function, calls


def test_failures_a_passing_fault_is_tried_again():
    waited = []
    function, calls = _failing(4, errors.TransientStorageError("busy"))
    assert retrying(waited.append, function, 7) == 7
    assert calls == [7] * 5
    assert len(waited) == 4


def test_failures_a_fault_that_stays_is_raised_in_the_end():
    function, calls = _failing(99, errors.ChecksumError("wrong"))
    with pytest.raises(errors.ChecksumError):
        retrying(lambda _: None, function, 7)
    assert len(calls) == 3


@pytest.mark.parametrize("error", [errors.NoSpaceError("full"), errors.WorkerLostError("gone"), KeyError()])
def test_failures_what_cannot_pass_is_raised_at_once(error):
    function, calls = _failing(1, error)
    with pytest.raises(type(error)):
        retrying(lambda _: None, function, 7)
    assert len(calls) == 1


def test_failures_a_run_that_is_stopped_does_not_try_again():
    function, calls = _failing(99, errors.TransientStorageError("busy"))
    with pytest.raises(errors.TransientStorageError):
        retrying(lambda _: True, function, 7)
    assert len(calls) == 1
