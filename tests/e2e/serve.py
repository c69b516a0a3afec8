# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` process for tests, and what it must not leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from footprint import Footprint

START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 30.0


class ServeProcess:
    """``vllm serve`` on a free port; its log stands in ``log``."""

    def __init__(self, model: str, log: Path, *options: str, **variables: str) -> None:
        self.model = model
        self.log = log
        # Short, because sockets lie in it: their paths may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="serve-"))
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        vllm = Path(sys.executable).with_name("vllm")
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [vllm, "serve", model, "--port", str(port), *options],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TMPDIR": str(self.directory)} | variables,
                start_new_session=True,
            )
        self.footprint = Footprint(self.process.pid)
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill_all()
            raise
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_tail()
            self.footprint.look()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"not ready in time:\n{self.log_tail()}")

    def complete(self, prompts: list[list[int]], num_tokens: int) -> list[Any]:
        """Greedy completions of token-id prompts, in their order."""
        reply = httpx.post(
            f"{self.url}/v1/completions",
            timeout=600,
            json={
                "model": self.model,
                "prompt": prompts,
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 2,
                "return_token_ids": True,
            },
        )
        assert reply.status_code == 200, reply.text
        return sorted(reply.json()["choices"], key=lambda choice: choice["index"])

    def metrics(self) -> str:
        """The text of ``/metrics``."""
        return httpx.get(f"{self.url}/metrics", timeout=30).text

    def memory_node(self) -> psutil.Process:
        """The memory node that the engine started."""
        (node,) = [
            child
            for child in self.children
            if "vllm_attn_offload.memory_node.main" in child.cmdline()
        ]
        return node

    def end(self, signum: signal.Signals) -> list[str]:
        """Send a signal to the API server; returns what is left after a while."""
        self.footprint.look()
        self.process.send_signal(signum)
        self.process.wait(STOP_DEADLINE_S)
        deadline = time.monotonic() + STOP_DEADLINE_S
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.kill_all()
        return left

    def leftovers(self) -> list[str]:
        """Processes, sockets and shared memory that this server made."""
        return [
            *self.footprint.left(),
            *(str(path) for path in self.directory.glob("attn-offload-*")),
        ]

    def kill_all(self) -> None:
        """End everything that may still run, and remove what it then leaves."""
        self.footprint.look()
        self.footprint.remove()
        self.process.wait(STOP_DEADLINE_S)
        shutil.rmtree(self.directory, ignore_errors=True)

    def log_tail(self) -> str:
        """The end of the log, for messages."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-60:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
