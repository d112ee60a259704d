"""S3 servers for the tests, each started once: SeaweedFS, moto, and rclone as an ill-behaved one."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import boto3
import pytest
from botocore.config import Config

from asyncshard.testing.seaweedfs import RunningServer, seaweedfs


class Bucket(NamedTuple):
    """A bucket of a server, and a synchronous client to fill it with."""

    name: str
    client: Any
    storage_options: dict[str, str]

    def put(self, key, data, **more):
        return self.client.put_object(Bucket=self.name, Key=key, Body=data, **more)["ETag"]

    def put_all(self, prefix, files):
        """Put files below a prefix; return the prefix's URL."""
        for name, data in files.items():
            self.put(f"{prefix}/{name}", data)
        return f"s3://{self.name}/{prefix}"

    def remove(self, key):
        self.client.delete_object(Bucket=self.name, Key=key)


def _bucket(server, name="models"):
    client = boto3.client("s3", **server.storage_options, config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket=name)
    return Bucket(name, client, server.storage_options)


@contextlib.contextmanager
def _program(command, port):
    """Run a server until it has been used; it is ready when its port is open."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                yield
                return
            time.sleep(0.05)
        pytest.fail(f"{command[0]} did not start")
    finally:
        process.kill()
        process.wait()


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def seaweed():
    with seaweedfs() as server:
        yield _bucket(server)


@pytest.fixture(scope="session")
def moto():
    port = _free_port()
    with _program([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield _bucket(RunningServer(f"http://127.0.0.1:{port}", "key", "secret"))


@pytest.fixture(scope="session")
def rclone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rclone")
    port = _free_port()
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    program = shutil.which("rclone", path=path)
    assert program is not None
    command = [program, "serve", "s3", f"--addr=127.0.0.1:{port}", "--auth-key=key,secretsecret", str(folder)]
    with _program([*command, f"--config={folder}/none"], port):
        yield _bucket(RunningServer(f"http://127.0.0.1:{port}", "key", "secretsecret"))


_prefixes = itertools.count()


@pytest.fixture
def prefix():
    """A prefix that no other test uses."""
    return f"prefix-{next(_prefixes)}"
