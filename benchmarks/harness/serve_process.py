# SPDX-License-Identifier: Apache-2.0
"""A ``vllm serve`` process, and what it must not leave behind."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from harness.footprint import Footprint
from harness.processes import ManagedProcess, free_port

VLLM = Path(sys.executable).with_name("vllm")


class ServeProcess(ManagedProcess):
    """``vllm serve`` on a free port, ready when constructed.

    Args:
        model: Model to serve.
        log: File that its output is appended to.
        *options: More of the command line.
        command: Runs in place of the installed command.
        host: Address of the host that it serves on.
        **variables: Added to its environment.

    Raises:
        ProcessError: It did not become ready.
    """

    start_timeout_s = 300.0
    stop_timeout_s = 30.0

    def __init__(
        self,
        model: str,
        log: Path,
        *options: str,
        command: Sequence[str | Path] = (VLLM,),
        host: str = "127.0.0.1",
        **variables: str,
    ) -> None:
        self.model = model
        self.log = log
        # Short, because sockets lie in it: their paths may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="serve-"))
        port = free_port()
        self.url = f"http://{host}:{port}"
        super().__init__(
            "vllm serve",
            [*command, "serve", model, "--port", str(port), *options],
            log,
            health_url=f"{self.url}/health",
            variables={"TMPDIR": str(self.directory)} | variables,
            own_session=True,
        )
        self.footprint = Footprint(self.process.pid)
        try:
            self.wait_until_ready(self.footprint.look)
        except BaseException:
            self.kill_all()
            raise
        self.children = psutil.Process(self.process.pid).children(recursive=True)

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
        self.process.wait(self.stop_timeout_s)
        deadline = time.monotonic() + self.stop_timeout_s
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
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
