"""Which responses to a range request are data."""

import pytest

from asyncshard.errors import ObjectChangedError, StoreError
from asyncshard.stores.http.failures import Action, Failed
from asyncshard.stores.http.response import Pin, RangeRequest, ResponseHead, require_range

PIN = Pin('"tag"', 100)


def head(status=206, **headers):
    """A right response to bytes 10-19 of 100, with some headers changed, or with None removed."""
    right = {"etag": '"tag"', "content-range": "bytes 10-19/100", "content-length": "10"}
    changed = {name.replace("_", "-"): value for name, value in headers.items()}
    return ResponseHead(status, {name: value for name, value in (right | changed).items() if value is not None})


REQUEST = RangeRequest(10, 20, PIN)


def test_the_right_response_is_data():
    assert require_range(head(), REQUEST) == (PIN, 10)
    assert require_range(head(content_length=None), REQUEST) == (PIN, 10)
    assert require_range(head(content_encoding="identity"), REQUEST) == (PIN, 10)


def test_the_first_response_pins_and_may_be_shorter():
    first = head(content_range="bytes 0-99/100", content_length="100")
    assert require_range(first, RangeRequest(0, 65536, None)) == (PIN, 100)
    with pytest.raises(Failed):
        require_range(first, RangeRequest(0, 65536, PIN))


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({"etag": '"other"'}, ObjectChangedError),
        ({"content_range": "bytes 10-19/101"}, ObjectChangedError),
        ({"etag": None}, StoreError),
        ({"etag": 'W/"tag"'}, StoreError),
        ({"content_range": None}, StoreError),
        ({"content_range": "bytes 10-19/*"}, StoreError),
        ({"content_range": "bytes 11-20/100"}, StoreError),
        ({"content_range": "bytes 10-18/100"}, StoreError),
        ({"content_range": "bytes 10-20/100"}, StoreError),
        ({"content_range": "items 10-19/100"}, StoreError),
        ({"content_length": "9"}, StoreError),
        ({"content_length": "11"}, StoreError),
        ({"content_encoding": "gzip"}, StoreError),
        ({"content_encoding": "aws-chunked"}, StoreError),
    ],
)
def test_any_other_response_is_never_data(headers, kind):
    with pytest.raises(Failed) as caught:
        require_range(head(**headers), REQUEST)
    assert (caught.value.failure.kind, caught.value.failure.action) == (kind, Action.GIVE_UP)


@pytest.mark.parametrize("status", [200, 203, 204])
def test_a_success_without_a_range_is_not_data(status):
    with pytest.raises(Failed, match="ranges"):
        require_range(head(status), REQUEST)


def test_a_response_about_another_object_says_how_it_differs():
    with pytest.raises(Failed, match='its ETag was "tag" and is now "other"') as caught:
        require_range(head(etag='"other"', x_amz_request_id="ID"), REQUEST)
    assert caught.value.failure.request_id == "ID"
