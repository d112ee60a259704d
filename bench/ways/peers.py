"""Other libraries that load checkpoints. Each way ends with `copy_` into the same state dict."""

from __future__ import annotations

import logging

from bench.ways.base import Case, Run, Way


def _safe_open(case: Case, backend: str) -> Run:
    from safetensors import safe_open

    state = case.destinations()

    def run() -> None:
        for path in case.data.files:
            with safe_open(path, framework="pt", backend=backend) as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    state[name].copy_(file.get_tensor(name))

    return run


def _safe_open_one_thread(case: Case) -> Run:
    """Read with `safe_open`, and `copy_` in one thread: on a busy core, two threads wait for each other."""
    import torch

    torch.set_num_threads(1)
    return _safe_open(case, "mmap")


def _load_file(case: Case) -> Run:
    from safetensors.torch import load_file

    state = case.destinations()

    def run() -> None:
        for path in case.data.files:
            for name, tensor in load_file(path).items():
                state[name].copy_(tensor)

    return run


def _fastsafetensors(case: Case) -> Run:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    state = case.destinations()

    def run() -> None:
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        try:
            loader.add_filenames({0: [str(path) for path in case.data.files]})
            buffers = loader.copy_files_to_device()
            try:
                for name in loader.get_keys():
                    state[name].copy_(buffers.get_tensor(name))
            finally:
                buffers.close()
        finally:
            loader.close()

    return run


def _runai_model_streamer(case: Case) -> Run:
    from runai_model_streamer import SafetensorsStreamer

    logging.disable(logging.INFO)
    state = case.destinations()

    def run() -> None:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in case.data.files])
            for name, tensor in streamer.get_tensors():
                state[name].copy_(tensor)

    return run


PEERS = {
    "safetensors-safe-open": Way(lambda case: _safe_open(case, "mmap"), ("torch",)),
    "safetensors-safe-open-pread": Way(lambda case: _safe_open(case, "pread"), ("torch",)),
    "safetensors-safe-open-one-thread": Way(_safe_open_one_thread, ("torch",)),
    "safetensors-load-file": Way(_load_file, ("torch",)),
    "fastsafetensors": Way(_fastsafetensors, ("torch", "fastsafetensors")),
    "runai-model-streamer": Way(_runai_model_streamer, ("torch", "runai_model_streamer")),
}
