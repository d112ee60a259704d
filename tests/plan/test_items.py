"""Read items of whole tensors."""

from __future__ import annotations

import numpy as np

from asyncshard.plan.items import whole_tensors


def bounds(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    stops = np.cumsum(sizes).astype(np.int64)
    return stops - np.array(sizes, np.int64), stops


def test_an_item_holds_no_more_tensors_than_it_may() -> None:
    starts, stops = bounds([4] * 10)

    items = list(whole_tensors(0, starts, stops, limit=1000, max_tensors=4))

    assert [(item.first, item.last) for item in items] == [(0, 4), (4, 8), (8, 10)]
    assert [(item.start, item.stop) for item in items] == [(0, 16), (16, 32), (32, 40)]


def test_a_tensor_above_the_limit_is_alone() -> None:
    starts, stops = bounds([4, 4, 100, 4])

    items = list(whole_tensors(0, starts, stops, limit=50, max_tensors=4))

    assert [(item.first, item.last) for item in items] == [(0, 2), (2, 3), (3, 4)]


def test_empty_tensors_count_too() -> None:
    starts, stops = bounds([0, 0, 0, 4])

    items = list(whole_tensors(0, starts, stops, limit=50, max_tensors=2))

    assert [(item.first, item.last) for item in items] == [(0, 2), (2, 4)]
