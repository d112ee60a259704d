"""The gate at the end of the interpreter; saves are tested with it in ``tests/pipeline/writing/test_save.py``."""

import subprocess
import sys
import threading

import pytest

from asyncshard.tasks.exit_gate import ExitGate


def test_shutting_waits_for_those_inside_and_lets_nobody_in():
    gate = ExitGate()
    inside, go_on, is_shut = threading.Event(), threading.Event(), threading.Event()

    def stay() -> None:
        with gate, gate:  # one thread may be inside twice
            inside.set()
            go_on.wait()

    def shut() -> None:
        gate.shut()
        is_shut.set()

    threads = [threading.Thread(target=target) for target in (stay, shut)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    assert not is_shut.is_set()
    go_on.set()
    for thread in threads:
        thread.join()
    assert is_shut.is_set()
    with pytest.raises(RuntimeError, match="the interpreter is ending"), gate:
        pass


def test_an_error_inside_leaves_the_gate():
    gate = ExitGate()
    with pytest.raises(KeyError), gate:
        raise KeyError
    gate.shut()


FORKED = """
import os, sys, threading
from asyncshard.tasks.exit_gate import EXIT_GATE
inside, go_on = threading.Event(), threading.Event()
def stay():
    with EXIT_GATE:
        inside.set()
        go_on.wait()
thread = threading.Thread(target=stay)
thread.start()
inside.wait()
child = os.fork()
if not child:
    sys.exit(7)  # would wait for ever for a thread that is not there
status = os.waitpid(child, 0)[1]
go_on.set()
assert os.waitstatus_to_exitcode(status) == 7
"""


def test_a_forked_child_does_not_wait_for_the_threads_of_its_parent():
    result = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
