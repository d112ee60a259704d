"""Other libraries that read from S3, into the same state dict.

Clients that read ranges are told before the clock starts which bytes go where: they read no header.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.endpoint import ACCESS_KEY, BUCKET, IN_FLIGHT, RANGE_BYTES, REGION, SECRET_KEY, Endpoint, client_of
from bench.ways.base import Case, Run, Way, octets


class _Range(NamedTuple):
    """A byte range of an object, and the memory for its bytes."""

    key: str
    start: int
    stop: int
    places: list[tuple[int, memoryview]]
    """Pairs of an offset within the range and the memory for the bytes from that offset on."""

    def scatter(self, body: memoryview) -> None:
        for at, memory in self.places:
            memory[:] = body[at : at + len(memory)]


def _ranges(case: Case) -> Iterator[_Range]:
    """Yield the tensors' bytes of each file as ranges of 8 MiB."""
    state = case.destinations()
    for key, path in case.data.objects():
        tensors = [
            (placed.start, memoryview(octets(state[placed.tensor.name])))
            for placed in case.placed
            if placed.path == path
        ]
        if tensors:
            yield from _ranges_of(key, tensors, path)


def _ranges_of(key: str, tensors: list[tuple[int, memoryview]], path: Path) -> Iterator[_Range]:
    end = path.stat().st_size
    for start in range(min(begin for begin, _ in tensors), end, RANGE_BYTES):
        stop = min(start + RANGE_BYTES, end)
        places = [
            (max(begin - start, 0), memory[max(start - begin, 0) : stop - begin])
            for begin, memory in tensors
            if begin < stop and begin + len(memory) > start
        ]
        yield _Range(key, start, stop, places)


async def _read_all(ranges: list[_Range], read: Callable[[_Range], Awaitable[None]]) -> None:
    left = iter(ranges)

    async def work() -> None:
        for each in left:
            await read(each)

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(work())


def _endpoint(case: Case) -> Endpoint:
    assert case.endpoint is not None
    return case.endpoint


def _obstore(case: Case) -> Run:
    """Read with obstore's `get_range_async`, and copy."""
    import obstore
    from obstore.store import S3Store

    endpoint = _endpoint(case)
    ranges = list(_ranges(case))
    options: dict[str, Any] = {"allow_http": True}
    if endpoint.ca_file is not None:
        options = {"root_certificate": Path(endpoint.ca_file).read_text()}
    store = S3Store(
        BUCKET,
        endpoint=endpoint.url,
        region=REGION,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        virtual_hosted_style_request=False,
        client_options=options,
    )

    async def begin(stack: AsyncExitStack) -> None:
        await obstore.get_range_async(store, ranges[0].key, start=0, end=8)

    async def read(part: _Range) -> None:
        body = await obstore.get_range_async(store, part.key, start=part.start, end=part.stop)
        part.scatter(memoryview(body))

    async def run() -> None:
        await _read_all(ranges, read)

    case.open = begin
    return run


def _aiobotocore(case: Case) -> Run:
    """Read with aiobotocore's `get_object` and `read`, and copy."""
    ranges = list(_ranges(case))
    clients: list[Any] = []

    async def get(key: str, start: int, stop: int) -> bytes:
        answer = await clients[0].get_object(Bucket=BUCKET, Key=key, Range=f"bytes={start}-{stop - 1}")
        async with answer["Body"] as body:
            content: bytes = await body.read()
        return content

    async def begin(stack: AsyncExitStack) -> None:
        clients.append(await stack.enter_async_context(client_of(_endpoint(case))))
        await get(ranges[0].key, 0, 8)

    async def read(part: _Range) -> None:
        part.scatter(memoryview(await get(part.key, part.start, part.stop)))

    async def run() -> None:
        await _read_all(ranges, read)

    case.open = begin
    return run


def _runai_model_streamer(case: Case) -> Run:
    """Read with the streamer of runai-model-streamer, with its own number of requests in flight, and `copy_`."""
    url = _endpoint(case).url
    os.environ |= {
        "AWS_ENDPOINT_URL": url,
        "RUNAI_STREAMER_S3_ENDPOINT": url,
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    from runai_model_streamer import SafetensorsStreamer

    logging.disable(logging.INFO)
    state = case.destinations()
    paths = [f"s3://{BUCKET}/{key}" for key, path in case.data.objects() if path in case.data.files]
    opened: list[Any] = []

    async def begin(stack: AsyncExitStack) -> None:
        streamer = stack.enter_context(SafetensorsStreamer())
        streamer.stream_file(paths[-1], tensor_names={"model.norm.weight"})
        for name, tensor in streamer.get_tensors():
            state[name].copy_(tensor)
        opened.append(streamer)

    def run() -> None:
        streamer = opened[0]
        streamer.stream_files(paths)
        for name, tensor in streamer.get_tensors():
            state[name].copy_(tensor)

    case.open = begin
    return run


S3_PEERS = {
    "s3-obstore": Way(_obstore, ("torch", "obstore")),
    "s3-aiobotocore": Way(_aiobotocore, ("torch", "aiobotocore")),
    "s3-runai-model-streamer": Way(_runai_model_streamer, ("torch", "runai_model_streamer", "runai_model_streamer_s3")),
}
