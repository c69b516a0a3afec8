# SPDX-License-Identifier: Apache-2.0
"""The class that starts and stops processes of benchmarks and tests."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from harness.processes import READY_FD, ManagedProcess, ProcessError

ANSWERS = """
import os, sys
ready = os.fdopen(int(sys.argv[1]), "w")
print("here", file=ready, flush=True)
for line in sys.stdin:
    print(line.strip()[::-1], file=ready, flush=True)
"""
IGNORES_SIGTERM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(int(sys.argv[1]), b"ready")
os.close(int(sys.argv[1]))
time.sleep(60)
"""


def start(code: str, log: Path) -> ManagedProcess:
    return ManagedProcess("it", [sys.executable, "-c", code, READY_FD], log)


def test_answers_until_it_is_stopped(tmp_path: Path) -> None:
    process = start(ANSWERS, tmp_path / "log")
    assert process.wait_until_ready() == "here"
    process.tell("abc")
    assert process.read_line(30) == "cba"
    with pytest.raises(ProcessError, match=r"it did not answer within 0\.1 s"):
        process.read_line(0.1)
    assert process.stop() == -signal.SIGTERM
    assert process.stop() == -signal.SIGTERM


def test_sigkill_where_sigterm_is_not_enough(tmp_path: Path) -> None:
    process = start(IGNORES_SIGTERM, tmp_path / "log")
    process.stop_timeout_s = 0.5
    assert process.wait_until_ready() == "ready"
    assert process.stop() == -signal.SIGKILL


def test_error_shows_what_the_process_wrote(tmp_path: Path) -> None:
    process = start("raise ValueError('no model')", tmp_path / "log")
    with pytest.raises(ProcessError, match=r"(?s)it ended early.*ValueError: no model"):
        process.wait_until_ready()
    with pytest.raises(ProcessError, match="it ended with status 1"):
        process.finish(30)


def test_finish_has_a_deadline(tmp_path: Path) -> None:
    process = start("import time; time.sleep(60)", tmp_path / "log")
    with pytest.raises(ProcessError, match=r"it did not end within 0\.5 s"):
        process.finish(0.5)
    assert process.process.poll() == -signal.SIGKILL
