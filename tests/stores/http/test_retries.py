"""When a failed request is made again."""

import pytest

from asyncshard.stores.http.failures import REMEDIES, Action, Failure
from asyncshard.stores.http.retries import Retries, RetryPolicy

POLICY = RetryPolicy(max_attempts=4, deadline_s=60, first_pause_s=1, longest_pause_s=5)
RETRY = Failure("it failed", action=Action.RETRY)


def test_pauses_are_between_nothing_and_a_bound_that_doubles():
    policy = RetryPolicy(max_attempts=9, deadline_s=60, first_pause_s=1, longest_pause_s=5)
    for share in (0.0, 0.5, 1.0):
        retries = Retries(policy, jitter=lambda share=share: share)
        pauses = [retries.pause_after(RETRY, has_progressed=False) for _ in range(5)]
        assert pauses == [share * bound for bound in (1, 2, 4, 5, 5)]


def test_attempts_that_bring_nothing_end():
    retries = Retries(POLICY)
    pauses = [retries.pause_after(RETRY, has_progressed=False) for _ in range(4)]
    assert [pause is None for pause in pauses] == [False, False, False, True]


def test_progress_resets_the_attempts():
    retries = Retries(POLICY, jitter=lambda: 1.0)
    assert {retries.pause_after(RETRY, has_progressed=True) for _ in range(100)} == {1.0}
    assert retries.pause_after(RETRY, has_progressed=False) == 2.0


def test_one_attempt_means_no_retry():
    retries = Retries(RetryPolicy(max_attempts=1, deadline_s=60))
    assert retries.pause_after(RETRY, has_progressed=True) is None


def test_what_nothing_helps_against_is_not_tried_again():
    assert Retries(POLICY).pause_after(Failure("no"), has_progressed=True) is None


def test_an_idle_connection_that_was_closed_costs_no_attempt():
    retries = Retries(POLICY)
    closed = Failure("closed", action=Action.RETRY_AT_ONCE)
    assert [retries.pause_after(closed, has_progressed=False) for _ in range(20)] == [0.0] * 20
    assert retries.pause_after(RETRY, has_progressed=False) is not None


@pytest.mark.parametrize("action", sorted(REMEDIES, key=lambda action: action.value))
def test_remedies_are_tried_once_each(action):
    retries = Retries(POLICY)
    failure = Failure("expired", action=action)
    assert retries.pause_after(failure, has_progressed=False) == 0.0
    assert retries.pause_after(failure, has_progressed=False) is None


def test_the_pause_that_the_server_asks_for_is_kept():
    failure = Failure("slow down", action=Action.RETRY, retry_after_s=30)
    assert Retries(POLICY).pause_after(failure, has_progressed=False) == 30
