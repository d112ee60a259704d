"""The servers that the cases of S3 read from: SeaweedFS, nginx, and the slow server of `bench.late`.

Each server listens on loopback, is started for the first case that needs it, and ends with the run. If its program is
not installed, its cases are absent from the results.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.checkpoint import Dataset
from bench.endpoint import ACCESS_KEY, BUCKET, LATENCY_S, SECRET_KEY, Endpoint, client_of

_READY_S = 60.0
"""A server has 60 seconds to start."""
_STOP_S = 2.0
"""A server that has not ended 2 seconds after SIGTERM is killed."""
_ATTEMPTS = 40
"""Files are uploaded in at most 40 attempts: a server that has just started may refuse some."""
_PART_BYTES = 64 << 20
"""Files are uploaded in parts of 64 MiB."""


class Absent(Exception):
    """A server is not available; the message says why."""


class Server(ABC):
    """One server of objects. `start` starts its process, `stop` ends it; `stop` may be called at any time."""

    def __init__(self, data: Dataset, folder: Path) -> None:
        self._data = data
        self._folder = folder.absolute()
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def start(self) -> Endpoint:
        """Start the server with the files of the data set as objects, and wait until it answers.

        Raises
        ------
        Absent
            A program that the server needs is not installed, or the server does not answer.
        """

    def counts(self) -> dict[str, float]:
        """Return the server's own counts, where it has some: ``requests`` answered, ``sent_bytes``."""
        return {}

    def stop(self) -> None:
        """End the server's process. A process that does not end by itself, as SeaweedFS may not, is killed."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _run(self, command: list[str], **streams: Any) -> subprocess.Popen[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "output").open("wb") as output:
            given = {"stdout": output, "stderr": output} | streams
            # The server stands for another machine, so it gets a core only when the client does not need it.
            self._process = subprocess.Popen(
                [program_of("nice"), "-n", "19", *command], cwd=self._folder, stdin=subprocess.DEVNULL, **given
            )
        return self._process

    def _wait_for(self, port: int) -> None:
        """Wait until the server answers on a port, with whatever status."""
        until = time.monotonic() + _READY_S
        while time.monotonic() < until:
            assert self._process is not None
            if self._process.poll() is not None:
                raise Absent(f"it ended with exit status {self._process.returncode}: see {self._folder / 'output'}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
        raise Absent(f"no answer in {_READY_S:g} s: see {self._folder / 'output'}")


class SeaweedFS(Server):
    """SeaweedFS, a real object store. Its objects are kept from one run to the next."""

    def start(self) -> Endpoint:
        program = program_of("weed")
        store = self._folder / "objects"
        store.mkdir(parents=True, exist_ok=True)
        config = self._folder / "s3.json"
        config.write_text(json.dumps(_IDENTITIES))
        *ports_of_parts, self._metrics_port = _free_ports(len(_WEED_PORTS) + 1)
        ports = dict(zip(_WEED_PORTS, ports_of_parts, strict=True))
        self._run(
            [
                program,
                "server",
                f"-dir={store}",
                "-ip=127.0.0.1",
                "-s3",
                f"-s3.config={config}",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-master.telemetry=false",
                f"-metricsPort={self._metrics_port}",
                "-master.volumeSizeLimitMB=4096",
                "-volume.max=50",
                "-volume.preStopSeconds=0",
                *(f"-{name}={port}" for name, port in ports.items()),
            ]
        )
        endpoint = Endpoint(f"http://127.0.0.1:{ports['s3.port']}")
        self._wait_for(ports["s3.port"])
        asyncio.run(_upload(endpoint, self._data))
        return endpoint

    def counts(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        sent = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(_SENT_BYTES))
        return {"sent_bytes": sent}


_WEED_PORTS = tuple(f"{part}.port{twin}" for part in ("master", "volume", "filer", "s3") for twin in ("", ".grpc"))
_SENT_BYTES = "SeaweedFS_s3_bucket_traffic_sent_bytes_total"
_IDENTITIES = {
    "identities": [
        {
            "name": "bench",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
    ]
}


async def _upload(endpoint: Endpoint, data: Dataset) -> None:
    """Upload the files that are not stored yet. A server that has just started may need some attempts."""
    async with client_of(endpoint) as client:
        for attempt in range(_ATTEMPTS):
            try:
                if BUCKET not in [bucket["Name"] for bucket in (await client.list_buckets())["Buckets"]]:
                    await client.create_bucket(Bucket=BUCKET)
                for key, path in data.objects():
                    await _upload_file(client, key, path, path.stat().st_size)
                    await _read_each_part(client, key, path.stat().st_size)
                return
            except Exception as error:
                if attempt == _ATTEMPTS - 1:
                    raise Absent(f"the files cannot be put there, or read: {error}") from None
                await asyncio.sleep(0.5)


async def _upload_file(client: Any, key: str, path: Path, size: int) -> None:
    listed = (await client.list_objects_v2(Bucket=BUCKET, Prefix=key)).get("Contents", ())
    if any(entry["Key"] == key and entry["Size"] == size for entry in listed):
        return
    upload = {"Bucket": BUCKET, "Key": key}
    upload |= {"UploadId": (await client.create_multipart_upload(**upload))["UploadId"]}
    parts = []
    with path.open("rb") as file:
        while piece := file.read(_PART_BYTES):
            number = len(parts) + 1
            answer = await client.upload_part(**upload, PartNumber=number, Body=piece)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    await client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})


async def _read_each_part(client: Any, key: str, size: int) -> None:
    """Read a byte of each part. This fails while the server lists an object and has not loaded the volumes it is in."""
    for start in range(0, size, _PART_BYTES):
        answer = await client.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={start}-{start}")
        async with answer["Body"] as body:
            await body.read()


class Nginx(Server):
    """nginx, which serves the files over HTTP with little CPU. It ignores signatures, and lists from a fixed file."""

    is_tls = False

    def start(self) -> Endpoint:
        program = program_of("nginx")
        self._folder.mkdir(parents=True, exist_ok=True)
        plain, tls = _free_ports(2)
        certificate = make_certificate(self._folder) if self.is_tls else None
        (self._folder / "listing.xml").write_text(_listing(self._data))
        config = self._folder / "nginx.conf"
        config.write_text(_nginx_config(self._folder, self._data, plain, tls if self.is_tls else None))
        self._run([program, "-p", str(self._folder), "-c", str(config), "-e", str(self._folder / "error.log")])
        self._wait_for(plain)
        if certificate is None:
            return Endpoint(f"http://127.0.0.1:{plain}")
        return Endpoint(f"https://127.0.0.1:{tls}", str(certificate))

    def counts(self) -> dict[str, float]:
        with (self._folder / "access.log").open("rb") as log:
            return {"requests": sum(1 for _ in log)}


class NginxTls(Nginx):
    """nginx over TLS, with a certificate that is made for this run."""

    is_tls = True


def _listing(data: Dataset) -> str:
    entries = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;0&quot;</ETag><Size>{path.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key, path in data.objects()
        if key.startswith("rank/")
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>rank/</Prefix><Delimiter>/</Delimiter><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    )


def _nginx_config(folder: Path, data: Dataset, plain: int, tls: int | None) -> str:
    """Return the configuration of nginx.

    It turns sendfile off: over loopback, sendfile would pass pages of the page cache to the client, and the client
    would pay for the cache misses.
    """
    secure = "" if tls is None else f"listen 127.0.0.1:{tls} ssl; ssl_certificate tls.pem; ssl_certificate_key tls.key;"
    return f"""
daemon off;
user root;
worker_processes auto;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  sendfile off;
  output_buffers 2 256k;
  keepalive_requests 1000000;
  default_type application/octet-stream;
  server {{
    listen 127.0.0.1:{plain};
    {secure}
    location = /{BUCKET} {{ default_type application/xml; alias {folder}/listing.xml; }}
    location = /{BUCKET}/ {{ default_type application/xml; alias {folder}/listing.xml; }}
    location /{BUCKET}/ {{ alias {data.folder.absolute()}/; }}
  }}
}}
"""


def make_certificate(folder: Path) -> Path:
    """Make a key and a self-signed certificate for 127.0.0.1; return the path of the certificate."""
    certificate = folder / "tls.pem"
    command = [
        program_of("openssl"),
        *("req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=asyncshard benchmark"),
        *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"),
        *("-keyout", str(folder / "tls.key"), "-out", str(certificate)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Absent(f"openssl makes no certificate: {(done.stderr.splitlines() or ['no output'])[-1]}")
    return certificate


class Scripted(Server):
    """The slow server of `bench.late`."""

    def start(self) -> Endpoint:
        import asyncshard.testing

        if find_spec("h11") is None or not hasattr(asyncshard.testing, "S3Server"):
            raise Absent("asyncshard.testing has no S3Server here")
        command = [sys.executable, "-m", "bench.late", "--latency", str(LATENCY_S)]
        for key, path in self._data.objects():
            if path == self._data.late:
                command += [key, str(path.absolute())]
        process = self._run(command, stdout=subprocess.PIPE, env=_environment())
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        if not url:
            raise Absent(f"it did not start: see {self._folder / 'output'}")
        return Endpoint(url)


def _environment() -> dict[str, str]:
    """Return environment variables with which a process finds this package from any directory."""
    paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


_KINDS: dict[str, type[Server]] = {"seaweedfs": SeaweedFS, "nginx": Nginx, "nginx-tls": NginxTls, "late": Scripted}


class Servers:
    """The servers of one run, each started when it is first needed. All end with the ``with`` block."""

    def __init__(self, data: Dataset, folder: Path) -> None:
        self._data = data
        self._folder = folder
        self._started: dict[str, Server] = {}
        self._found: dict[str, Endpoint | Absent] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            for server in self._started.values():
                stack.callback(server.stop)

    def endpoint(self, kind: str) -> Endpoint:
        """Return the address of a server, which is started if it does not run yet.

        Raises
        ------
        Absent
            The server is not available. Later calls raise the same error, and do not try again.
        """
        if kind not in self._found:
            self._data.generate_objects()
            server = self._started[kind] = _KINDS[kind](self._data, self._folder / kind)
            try:
                self._found[kind] = server.start()
            except Absent as reason:
                self._found[kind] = Absent(f"no server {kind}: {reason}")
        found = self._found[kind]
        if isinstance(found, Absent):
            raise found
        return found

    def counts(self, kind: str) -> dict[str, float]:
        """Return the counts of a server that was started."""
        return self._started[kind].counts()


def program_of(name: str) -> str:
    """Return the path of a program. It may be one that was installed with this interpreter's packages.

    Raises
    ------
    Absent
        The program is not installed.
    """
    folders = (None, sysconfig.get_path("scripts"), "/usr/sbin")
    for folder in folders:
        path = shutil.which(name, path=folder)
        if path:
            return path
    raise Absent(f"{name} is not installed")


def _free_ports(count: int) -> Iterator[int]:
    """Return different ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return iter([each.getsockname()[1] for each in sockets])
