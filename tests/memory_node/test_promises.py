# SPDX-License-Identifier: Apache-2.0
"""What nodes of one host have promised, as processes see it of each other."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from vllm_attn_offload.memory_node.promises import Promises

MIB = 1 << 20
#: Promises so many MiB, touches some of them for each line that it reads.
PROMISER = """
import sys
from vllm_attn_offload.memory_node.promises import Promises
promise = Promises(sys.argv[1]).add("cpu", int(sys.argv[2]) << 20)
touched = []
print(flush=True)
for line in sys.stdin:
    touched.append(b"x" * (int(line) << 20))
    print(flush=True)
"""


@pytest.fixture
def registry() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def promiser(registry: str, mib: int, *prefix: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", PROMISER, registry, str(mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
        process.kill()


def touch(process: subprocess.Popen[str], mib: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{mib}\n")
    process.stdin.flush()
    assert process.stdout.readline()


def test_promises_of_other_processes(registry: str) -> None:
    """They count until their process ends, by kill -9 too."""
    promises = Promises(registry)
    assert promises.promised_bytes("cpu") == 0
    with promiser(registry, 300), promiser(registry, 200) as second:
        assert promises.promised_bytes("cpu") == 500 * MIB
        assert promises.promised_bytes("GPU-1") == 0
        assert Promises(f"{registry}-2").promised_bytes("cpu") == 0
        second.kill()
        second.wait()
        assert promises.promised_bytes("cpu") == 300 * MIB
    assert promises.promised_bytes("cpu") == 0


def test_touched_memory_is_not_free_any_more(registry: str) -> None:
    promises = Promises(registry)
    with promiser(registry, 100) as process:
        assert 95 * MIB < promises.untouched_bytes() <= 100 * MIB
        touch(process, 60)
        assert 30 * MIB < promises.untouched_bytes() <= 40 * MIB
        touch(process, 60)
        assert promises.untouched_bytes() == 0
        assert promises.promised_bytes("cpu") == 100 * MIB


def test_process_that_cannot_be_seen_counts_in_full(registry: str) -> None:
    """One of another PID namespace has a number that means another process here."""
    unshare = (
        "unshare",
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--kill-child",
    )
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace can be made here")
    with promiser(registry, 100, *unshare) as process:
        touch(process, 60)
        assert Promises(registry).untouched_bytes() == 100 * MIB


def test_nonsense_is_ignored(registry: str) -> None:
    with contextlib.ExitStack() as opened:
        for name in ("cpu/1/2/x/4", "cpu/1/2/3", "cpu/1/2/3/4/5", "\n\xff"):
            sock = opened.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(f"\0{registry}/{name}")
        assert Promises(registry).promised_bytes("cpu") == 0
        assert Promises(registry).untouched_bytes() == 0


def test_lock_excludes_others_until_their_deadline(registry: str) -> None:
    promises = Promises(registry)
    with promises.lock():
        started = time.monotonic()
        with Promises(registry).lock(timeout_s=0.2):
            assert time.monotonic() - started >= 0.2
    started = time.monotonic()
    with promises.lock(timeout_s=60):
        assert time.monotonic() - started < 30


def test_promise_ends_when_it_is_closed() -> None:
    """A GPU's name is long, as is a number of bytes; a socket's is limited."""
    promises, gpu = Promises(), f"GPU-{uuid.uuid4()}"
    with promises.add(gpu, 10 * (1 << 40)):
        assert promises.promised_bytes(gpu) == 10 * (1 << 40)
    assert promises.promised_bytes(gpu) == 0
