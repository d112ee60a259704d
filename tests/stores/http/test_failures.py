"""A failure says whether a later call may succeed, and travels as the cause that it names."""

import pytest

from asyncshard.errors import AccessDeniedError, ObjectChangedError, StoreError
from asyncshard.stores.http.failures import REMEDIES, Action, Failed, Failure


@pytest.mark.parametrize(
    ("action", "is_retryable"),
    [
        (Action.GIVE_UP, False),
        (Action.RETRY, True),
        (Action.RETRY_AT_ONCE, True),
        *((action, False) for action in sorted(REMEDIES, key=lambda action: action.value)),
    ],
)
def test_a_later_call_may_succeed_where_the_same_request_may(action, is_retryable):
    assert Failure("it failed", action=action).is_retryable == is_retryable


def test_a_later_call_may_find_the_object_that_replaced_the_first():
    assert Failure("replaced", kind=ObjectChangedError).is_retryable
    assert not Failure("denied", kind=AccessDeniedError).is_retryable


def test_a_failure_that_nobody_classified_is_final_and_of_the_store():
    failure = Failure("it failed")
    assert (failure.action, failure.kind, failure.status) == (Action.GIVE_UP, StoreError, None)


def test_an_exception_carries_the_failure_and_its_reason():
    failure = Failure("the server failed", action=Action.RETRY, status=503)
    with pytest.raises(Failed, match=r"^the server failed$") as caught:
        raise Failed(failure)
    assert caught.value.failure is failure
