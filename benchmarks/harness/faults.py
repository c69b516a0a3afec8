# SPDX-License-Identifier: Apache-2.0
"""Faults for memory nodes of a running engine, and clients that live through them."""

from __future__ import annotations

import ctypes
import json
import os
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.geometry import (
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.messages import OpenSession, ReserveCapacity, Shard
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import Credentials

_SYS_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)
NODE_MODULE = "vllm_attn_offload.memory_node.main"
#: What an engine logs when a lost pool is restored and its workers use it.
IS_BACK = "the memory nodes are back"


def memory_nodes(server_pid: int) -> list[psutil.Process]:
    """Local memory nodes of a server, in the order of their index."""
    found = []
    for process in psutil.Process(server_pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if NODE_MODULE in process.cmdline():
                found.append((address(process), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def address(node: psutil.Process) -> str:
    """Address that a node listens on."""
    command = node.cmdline()
    return command[command.index("--listen") + 1]


def kill(node: psutil.Process) -> None:
    """Kill it, as the kernel's out-of-memory killer does."""
    node.kill()


def stop(node: psutil.Process) -> None:
    """Make it hang: no connection ends, nothing is answered."""
    node.send_signal(signal.SIGSTOP)


def resume(node: psutil.Process) -> None:
    """Wake a stopped node up, if it was not ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        node.send_signal(signal.SIGCONT)


def exhaust_descriptors(server_pid: int, duration_s: float) -> None:
    """Leave a server's engine and workers no descriptor for a while."""
    with ExitStack() as limits:
        for process in psutil.Process(server_pid).children(recursive=True):
            if process.name().startswith("VLLM::"):
                soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
                limits.callback(_set_limit, process, (soft, hard))
                _set_limit(process, (3, hard))
        time.sleep(duration_s)


def _set_limit(process: psutil.Process, limits: tuple[int, int]) -> None:
    with suppress(psutil.NoSuchProcess):
        process.rlimit(psutil.RLIMIT_NOFILE, limits)


def send_garbage(listens_on: str, choose: random.Random) -> None:
    """Connect as a stranger and send bytes of no meaning."""
    with suppress(OSError), Address.parse(listens_on).connect(5) as sock:
        sock.settimeout(5)
        sock.sendall(choose.randbytes(choose.randint(1, 1 << 16)))


def rotate_token(path: Path) -> None:
    """Put a new token where nodes and engines read it."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(secrets.token_hex(32))
    new.replace(path)


def visit(node: psutil.Process, choose: random.Random, token_file: str = "") -> bool:
    """Come as a second engine, hold a session for a while, and leave in some way.

    Returns:
        False if there was no room: a restarted local node only has its engine's.
    """
    layer = LayerGeometry("layer", 0, 0, 4, 2, 64, 64, 0.125)
    geometry = SessionGeometry("float32", [KVGroup(16)], [layer])
    with suppress(MemoryNodeError, psutil.NoSuchProcess):
        client = ControlClient(address(node), 5, Credentials(token_file))
        request = ReserveCapacity("neighbour", Shard(), geometry, 1 << 20)
        reserved = client.reserve(request)
        client.open_session(OpenSession(reserved.reservation, 0, 8, 64, 8, 8))
        time.sleep(choose.uniform(0.0, 2.0))
        if choose.random() < 0.5:
            client.close_session(reserved.reservation)
        client.close()
        return True
    return False


def drop_connections(process: psutil.Process, peer: str = "") -> int:
    """Shut the connected sockets of a process down, as a broken link does.

    Args:
        process: Owner of the sockets.
        peer: Drop only connections to this path or HOST:PORT; empty: all.

    Returns:
        The number of sockets that were shut down.
    """
    pidfd = os.pidfd_open(process.pid)
    num_dropped = 0
    try:
        for fd in map(int, os.listdir(f"/proc/{process.pid}/fd")):
            copy = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
            if copy >= 0:
                num_dropped += _shut_down(copy, peer)
    finally:
        os.close(pidfd)
    return num_dropped


def _shut_down(fd: int, peer: str) -> bool:
    try:
        with socket.socket(fileno=fd) as sock:
            if sock.type != socket.SOCK_STREAM:
                return False
            name = sock.getpeername()
            if isinstance(name, tuple):
                name = f"{name[0]}:{name[1]}"
            if peer and name != peer:
                return False
            sock.shutdown(socket.SHUT_RDWR)
            return True
    except OSError:
        with suppress(OSError):
            os.close(fd)
        return False


class Streams:
    """Concurrent streaming completions; tokens are counted as they come.

    Args:
        url: The server.
        model: Its model.
        prompts: Token ids, one stream each.
        num_tokens: Tokens of every answer.
        on_token: Called from threads with every chunk that has tokens.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompts: list[list[int]],
        num_tokens: int,
        on_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.errors: list[str] = []
        self._url = url
        self._on_token = on_token
        self._body = {
            "model": model,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        self._came = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=(index, prompt), daemon=True)
            for index, prompt in enumerate(prompts)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, num_tokens: int, timeout_s: float) -> bool:
        """Wait for a number of tokens of all streams; False if the time is over."""
        with self._came:
            return self._came.wait_for(
                lambda: sum(map(len, self.tokens)) >= num_tokens, timeout_s
            )

    def finish(self, timeout_s: float) -> list[list[int]]:
        """Tokens of all streams, which must have ended in time without an error."""
        for thread in self._threads:
            thread.join(timeout_s)
        assert not any(thread.is_alive() for thread in self._threads), "no end"
        assert self.errors == []
        return self.tokens

    def _read(self, index: int, prompt: list[int]) -> None:
        try:
            with httpx.stream(
                "POST",
                f"{self._url}/v1/completions",
                json={**self._body, "prompt": prompt},
                timeout=300,
            ) as reply:
                if reply.status_code != 200:
                    self.errors.append(f"status {reply.status_code}")
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self._take(index, json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.errors.append(repr(error))

    def _take(self, index: int, chunk: dict[str, Any]) -> None:
        if "choices" not in chunk:
            self.errors.append(str(chunk))
            return
        with self._came:
            for choice in chunk["choices"]:
                if token_ids := choice["token_ids"]:
                    self.tokens[index] += token_ids
                    self._on_token()
            self._came.notify_all()
