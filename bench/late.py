"""Serve files as S3 objects, slowly: ``python -m bench.late --latency SECONDS KEY FILE ...``.

It prints the URL of the server. Every answer begins SECONDS late.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from asyncshard import testing
from bench.endpoint import BUCKET


async def serve(latency_s: float, files: list[tuple[str, Path]]) -> None:
    """Serve the files until the process gets SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with testing.S3Server(latency_s=latency_s) as server:
        for key, path in files:
            server.put(bucket=BUCKET, key=key, data=path.read_bytes())
        print(server.endpoint_url, flush=True)
        await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.late", description=__doc__)
    parser.add_argument("--latency", type=float, required=True)
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    pairs = zip(options.files[::2], map(Path, options.files[1::2]), strict=True)
    asyncio.run(serve(options.latency, list(pairs)))


if __name__ == "__main__":
    main()
