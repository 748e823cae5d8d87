from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest

from iou_d2.engine.lock import locked
from iou_d2.errors import InputError

HOLD = """
import sys, time
from iou_d2.engine.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_no_folder_is_a_sentence():
    with pytest.raises(InputError, match="OUTPUT_DIR is empty: name a folder"):
        locked("").__enter__()


def test_another_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout.readline() == "held\n"
            holder = f"process {run.pid} on {socket.gethostname()} since 20"
            with pytest.raises(InputError, match=f"out is in use by {holder}.*another OUTPUT_DIR"):
                locked(folder).__enter__()
        finally:
            os.kill(run.pid, signal.SIGKILL)
    with locked(folder):
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()


def test_the_same_process_is_refused_until_the_end(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            with pytest.raises(InputError, match="is in use by"):
                locked(tmp_path).__enter__()
    assert (tmp_path / ".lock").read_text() == ""


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert "cannot be locked" in caplog.text
