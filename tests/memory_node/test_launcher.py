# SPDX-License-Identifier: Apache-2.0
"""A node that another process starts: it ends with that process, however it ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from node_process import eventually

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.launcher import (
    MemoryNodeProcess,
    local_address,
    local_name,
)
from vllm_attn_offload.transport.trust import Credentials

PARENT = """
import sys, time
from pathlib import Path
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
node = MemoryNodeProcess(
    Path(sys.argv[1]), kv_cache_gib=0.1, cpus="", startup_timeout_s=30
)
print(node.pid, node.address, flush=True)
time.sleep(600)
"""


def is_gone(pid: int) -> bool:
    # Orphans of a container without an init stay zombies.
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_start_and_stop(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    cpu = min(os.sched_getaffinity(0))
    node = MemoryNodeProcess(
        directory,
        kv_cache_gib=0.5,
        cpus=str(cpu),
        startup_timeout_s=30,
        name=local_name(Path("/tmp/attn-offload-0a1b2c3d-1-2")),
    )
    assert directory.stat().st_mode & 0o777 == 0o700
    client = ControlClient(node.address, 5)
    assert client.info.pid == node.pid
    assert client.info.name == f"{socket.gethostname()}/local-0a1b2c3d-1-2"
    assert client.info.kv_bytes_total == 1 << 29
    assert psutil.Process(node.pid).cpu_affinity() == [cpu]
    client.close()
    node.stop()
    node.stop()
    assert is_gone(node.pid)
    assert not directory.exists()


def test_tcp_with_a_token() -> None:
    """The node asks for it at every connection; it lies on no disk."""
    token = b"a secret of these tests, 32+ characters"
    node = MemoryNodeProcess(
        None,
        kv_cache_gib=0.1,
        cpus="",
        startup_timeout_s=30,
        listen="127.0.0.1:0",
        auth_token=token,
    )
    try:
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d+", node.address)
        for _ in range(2):
            trusted = ControlClient(node.address, 5, Credentials(token=token))
            assert trusted.info.pid == node.pid
            trusted.close()
        with pytest.raises(MemoryNodeError, match="asks for a token"):
            ControlClient(node.address, 5)
        assert token.decode() not in repr(Credentials(token=token))
        assert node.is_running
    finally:
        node.stop()
    assert not node.is_running


def test_parent_is_killed(tmp_path: Path) -> None:
    """kill -9 of the parent leaves neither process nor socket nor directory."""
    directory = tmp_path / "run"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid, address = parent.stdout.readline().split()
    client = ControlClient(address, 5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    client.wait_until_lost()
    client.close()
    assert eventually(lambda: is_gone(int(pid)))
    assert not directory.exists()


def test_kill_a_stopped_node(tmp_path: Path) -> None:
    """A stopped process takes no SIGTERM; the next node holds the same to the byte."""
    kv_bytes = (1 << 29) + 12_345
    for _ in range(2):
        node = MemoryNodeProcess(
            tmp_path / "run",
            kv_cache_gib=kv_bytes / (1 << 30),
            cpus="",
            startup_timeout_s=30,
        )
        client = ControlClient(node.address, 5)
        assert client.info.kv_bytes_total == kv_bytes
        os.kill(node.pid, signal.SIGSTOP)
        node.kill()
        assert is_gone(node.pid)
        assert client.wait_until_lost(5)
        client.close()


def test_node_ends_at_start(tmp_path: Path) -> None:
    with pytest.raises(MemoryNodeError, match=r"exit code 1\. .*check kv_cache_gib"):
        MemoryNodeProcess(
            tmp_path / "run", kv_cache_gib=1e6, cpus="", startup_timeout_s=30
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_cache_gib": 1e6}, "--kv-cache-gib 1e+06 is more than the "),
        ({"cpus": "4096"}, "argument --cpus: '4096' is not a list of usable CPUs"),
        ({"auth_token_file": "/nowhere"}, "/nowhere"),
        ({"device": "cuda:999"}, "--device cuda:999 is not on this host"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_last_words_are_part_of_the_error(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: dict[str, Any],
    said: str,
) -> None:
    """What a node says before it ends is in the log, and its last line in the error."""
    defaults: dict[str, Any] = {"kv_cache_gib": 0.1, "cpus": ""}
    with pytest.raises(MemoryNodeError) as error:
        MemoryNodeProcess(
            tmp_path / "run", startup_timeout_s=60, **(defaults | options)
        )
    logged = capfd.readouterr().err.strip().splitlines()[-1]
    _, _, last = str(error.value).partition("It said: ")
    assert said in last
    assert logged.endswith(last.partition(" In the engine's options, check ")[0])
    assert "MemoryNode pid" not in last


def test_log_goes_on_after_the_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = MemoryNodeProcess(
        tmp_path / "run", kv_cache_gib=0.1, cpus="", startup_timeout_s=30
    )
    node.stop()
    lines = capfd.readouterr().err.splitlines()
    assert f"ready on {node.address}" in lines[0]
    # Its end is noticed by a signal and by a closed pipe, in either order.
    assert any(line.endswith("stopping") for line in lines)


def test_node_is_late(tmp_path: Path) -> None:
    others = psutil.Process().children()
    with pytest.raises(MemoryNodeError, match=r"not ready within 0\.01 s\. Raise"):
        MemoryNodeProcess(
            tmp_path / "run", kv_cache_gib=0.1, cpus="", startup_timeout_s=0.01
        )
    assert not (tmp_path / "run").exists()
    assert psutil.Process().children() == others


def test_no_descriptors_are_left(tmp_path: Path) -> None:
    """Wherever the start fails for it, nothing stays: no process, pipe or directory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = sorted(os.listdir("/proc/self/fd"))
    others = psutil.Process().children()
    started = 0
    for num_free in range(10):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_that_leaves(num_free), hard))
        try:
            with contextlib.suppress(MemoryNodeError):
                node = MemoryNodeProcess(
                    tmp_path / "run", kv_cache_gib=0.1, cpus="", startup_timeout_s=30
                )
                started += 1
                node.stop()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert psutil.Process().children() == others
        assert not (tmp_path / "run").exists()
        assert sorted(os.listdir("/proc/self/fd")) == before
    assert 0 < started < 10


def limit_that_leaves(num_free: int) -> int:
    """Limit of descriptors under which so many numbers are free; gaps count."""
    listed = os.listdir("/proc/self/fd")
    used = {int(fd) for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}
    free = (fd for fd in itertools.count() if fd not in used)
    return next(itertools.islice(free, num_free, None))


def test_many_descriptors_are_open(tmp_path: Path) -> None:
    """Pipes get numbers that select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with contextlib.ExitStack() as opened:
            for _ in range(1100):
                opened.enter_context(open(os.devnull, "rb"))
            node = MemoryNodeProcess(
                tmp_path / "run", kv_cache_gib=0.1, cpus="", startup_timeout_s=30
            )
            node.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert is_gone(node.pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the owner needs root")
def test_directory_of_another_user(tmp_path: Path) -> None:
    """No node starts in it, and nothing in it is touched."""
    theirs = Path(local_address(tmp_path / "run").removeprefix("unix:"))
    theirs.parent.mkdir(mode=0o700)
    theirs.touch()
    os.chown(theirs.parent, 12345, -1)
    with pytest.raises(MemoryNodeError, match=r"belongs to uid 12345\. Allowed: .*Use"):
        MemoryNodeProcess(
            theirs.parent, kv_cache_gib=0.1, cpus="", startup_timeout_s=30
        )
    assert theirs.exists()
