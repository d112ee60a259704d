"""Shared by all tests: two event loops, a check for leaks, and writers of checkpoints.

- Every async test runs twice: on asyncio in debug mode, and on uvloop.
- After every test no task, ``asyncshard`` thread or file descriptor is left that was not there before, and nothing was
  reported to the loop's exception handler.
- ``checkpoints`` (session scope, so that hypothesis tests may use it) makes shards, rank directories and Hugging Face
  directories out of tensors.
- ``tls`` is a certificate of this machine, and the authority that a client must trust for it.
"""

import asyncio
import datetime
import gc
import ipaddress
import json
import os
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import uvloop
from hypothesis import settings

from asyncshard.format.dtypes import DTYPES, from_numpy

settings.register_profile("asyncshard", deadline=None, max_examples=50)
settings.load_profile("asyncshard")


# --- event loops

uvloop.Loop().close()  # the first one opens a pipe for signals, which stays for the life of the process

_loops = []
"""Those made for the test that runs."""


class DebugLoop(asyncio.SelectorEventLoop):
    """asyncio's loop in debug mode, whatever the runner says."""

    def set_debug(self, enabled):
        super().set_debug(True)


_HANG_S = 60


def _end_hang(loop):
    loop.reports.append({"message": f"the test hangs: {[task.get_stack() for task in asyncio.all_tasks(loop)]}"})
    for task in asyncio.all_tasks(loop):
        task.cancel()


def _watched(make_loop):
    def make():
        loop = make_loop()
        loop.set_debug(isinstance(loop, DebugLoop))
        loop.reports = []
        loop.set_exception_handler(lambda loop, context: loop.reports.append(context))
        loop.call_later(_HANG_S, _end_hang, loop)
        _loops.append(loop)
        return loop

    return make


def pytest_asyncio_loop_factories():
    return {"asyncio": _watched(DebugLoop), "uvloop": _watched(uvloop.Loop)}


def pytest_collection_finish():
    """Take all that is there before the first test out of collections: each would take a third of a second."""
    gc.collect()
    gc.freeze()


# --- leaks


def _tasks():
    return {task for loop in _loops if not loop.is_closed() for task in asyncio.all_tasks(loop)}


def _threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("asyncshard")}


def _descriptors():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Look for tasks as soon as the test has ended: the runner cancels them, silently, when it closes the loop."""
    before = _tasks()
    result = yield
    left = _tasks() - before
    reports = [(context["message"], context.get("exception")) for loop in _loops for context in loop.reports]
    if left:
        pytest.fail(f"tasks left behind: {left}")
    if reports:
        pytest.fail(f"the event loop was told of: {reports}")
    return result


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail where a thread of ours or a file descriptor stays after the test and its event loop."""
    threads, descriptors = _threads(), _descriptors()
    yield
    _loops.clear()
    left = _threads() - threads
    if left:
        pytest.fail(f"threads left behind: {left}")
    if set(_descriptors().items()) - set(descriptors.items()):
        gc.collect()  # what only a cycle holds is not lost, and warns if it had to be closed
        opened = dict(set(_descriptors().items()) - set(descriptors.items()))
        if opened:
            pytest.fail(f"file descriptors left behind: {opened}")


# --- checkpoints


class Raw(NamedTuple):
    """A tensor by its bytes: for the types that NumPy lacks."""

    dtype: str
    shape: tuple
    data: bytes


def _raw(tensor):
    if isinstance(tensor, Raw):
        return tensor
    array = np.ascontiguousarray(tensor).reshape(np.shape(tensor))
    return Raw(from_numpy(array.dtype).name, array.shape, array.tobytes())


class Checkpoints:
    """Writers of checkpoints. Tensors are a mapping of name to NumPy array (of ml_dtypes too) or `Raw`."""

    Raw = Raw

    @staticmethod
    def shard(tensors, *, metadata=None, padding=None):
        """Return the bytes of a safetensors file, tensors in the mapping's order.

        `padding` is how many spaces end the header: an odd number puts every tensor at an odd offset or not. By
        default the data begins at a multiple of 8.
        """
        header = {} if metadata is None else {"__metadata__": metadata}
        offset = 0
        raws = {name: _raw(tensor) for name, tensor in tensors.items()}
        for name, raw in raws.items():
            header[name] = {
                "dtype": raw.dtype,
                "shape": list(raw.shape),
                "data_offsets": [offset, offset + len(raw.data)],
            }
            offset += len(raw.data)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8 if padding is None else padding)
        return len(text).to_bytes(8, "little") + text + b"".join(raw.data for raw in raws.values())

    @classmethod
    def write_file(cls, path, tensors, **options):
        """Write one safetensors file; return its path."""
        path = Path(path)
        path.write_bytes(cls.shard(tensors, **options))
        return path

    @classmethod
    def rank_files(cls, *parts, rank=0):
        """Return rank shards as a mapping of file name to bytes, one for each mapping of tensors."""
        return {f"model-rank-{rank}-part-{part}.safetensors": cls.shard(tensors) for part, tensors in enumerate(parts)}

    @classmethod
    def write_ranks(cls, directory, *parts, rank=0):
        """Write rank shards, one for each mapping of tensors; return the directory."""
        return cls._write(directory, cls.rank_files(*parts, rank=rank))

    @classmethod
    def hugging_face_files(cls, *shards):
        """Return a Hugging Face checkpoint as a mapping of file name to bytes, a shard for each mapping of tensors."""
        count = len(shards)
        files = {}
        weight_map = {}
        for number, tensors in enumerate(shards, 1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            files[name] = cls.shard(tensors, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))
        total = sum(len(_raw(tensor).data) for tensors in shards for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        return files

    @classmethod
    def write_hugging_face(cls, directory, *shards):
        """Write a Hugging Face checkpoint, one shard for each mapping of tensors; return the directory."""
        return cls._write(directory, cls.hugging_face_files(*shards))

    @staticmethod
    def _write(directory, files):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (directory / name).write_bytes(data)
        return directory

    @staticmethod
    def tensors(count, *, nbytes=4096, dtype="<f4", prefix="layer", seed=0):
        """Return `count` random tensors of `nbytes` each."""
        random = np.random.default_rng(seed)
        size = nbytes // np.dtype(dtype).itemsize
        return {f"{prefix}.{index}": random.integers(0, 100, size).astype(dtype) for index in range(count)}

    @staticmethod
    def every_dtype(*, elements=24, seed=0):
        """Return a random tensor of each of the 22 dtypes, as `Raw`, named after it."""
        random = np.random.default_rng(seed)
        tensors = {}
        for dtype in DTYPES:
            values = 2 if dtype.name == "BOOL" else 256  # any byte is a value of the other types
            data = random.integers(0, values, elements * dtype.bits // 8, np.uint8)
            tensors[dtype.name] = Raw(dtype.name, (elements,), data.tobytes())
        return tensors

    @staticmethod
    def bytes_of(tensor):
        """Return the bytes of a NumPy array or a torch tensor, in C order."""
        if isinstance(tensor, np.ndarray):
            return np.ascontiguousarray(tensor).tobytes()
        import torch

        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    @classmethod
    def same(cls, got, expected):
        """Return whether two mappings have the same names in the same order, and tensors of the same bytes."""
        return [(name, cls.bytes_of(tensor)) for name, tensor in got.items()] == [
            (name, _raw(tensor).data) for name, tensor in expected.items()
        ]


@pytest.fixture(scope="session")
def checkpoints():
    """Writers of checkpoints: see `Checkpoints`."""
    return Checkpoints


# --- TLS


class Tls(NamedTuple):
    """Both ends of TLS on this machine."""

    server_context: ssl.SSLContext
    """With a certificate for 127.0.0.1, ::1, localhost and *.localhost."""
    ca_path: Path
    """Certificate of the authority that signed it, in PEM."""


@pytest.fixture(scope="session")
def tls(tmp_path_factory):
    """A certificate for this machine: see `Tls`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    directory = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, server_name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("asyncshard tests", "localhost")
    )

    def certificate(subject, key, *, is_ca):
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
        )
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True, key_cert_sign=is_ca, encipher_only=False, decipher_only=False, **usage
                ),
                critical=True,
            )
        )

    names = x509.SubjectAlternativeName(
        [
            *(x509.DNSName(name) for name in ("localhost", "*.localhost")),
            *(x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")),
        ]
    )
    ca = certificate(ca_name, ca_key, is_ca=True).sign(ca_key, hashes.SHA256())
    server = certificate(server_name, server_key, is_ca=False).add_extension(names, critical=False)
    pem = serialization.Encoding.PEM
    ca_path = directory / "ca.pem"
    ca_path.write_bytes(ca.public_bytes(pem))
    chain = directory / "server.pem"
    chain.write_bytes(
        server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + server.sign(ca_key, hashes.SHA256()).public_bytes(pem)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return Tls(context, ca_path)
