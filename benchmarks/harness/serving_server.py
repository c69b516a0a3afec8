# SPDX-License-Identifier: Apache-2.0
"""A ``vllm serve`` process of ``serving.py``, and a watch on its ``/metrics``."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

VLLM = Path(sys.executable).with_name("vllm")
START_DEADLINE_S, STOP_DEADLINE_S = 600.0, 60.0
SAMPLE_EVERY_S = 0.5
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_use": "vllm:kv_cache_usage_perc",
}


class Server:
    """``vllm serve`` on a free port, ready when constructed.

    Args:
        name: Shown in the table.
        model: What to serve.
        options: More of the command line.
        variables: Added to the environment.
        log: Where its output goes.
    """

    def __init__(
        self,
        name: str,
        model: str,
        options: list[str],
        variables: dict[str, str],
        log: Path,
    ) -> None:
        self.name = name
        self._log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [str(VLLM), "serve", model, "--port", str(port), *options],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
                | variables,
                # A Ctrl-C reaches this script first; it stops both servers.
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[dict[str, float]]]:
        """Sample ``/metrics`` while the block runs: seconds, batch, queue, KV use."""
        samples: list[dict[str, float]] = []
        done = threading.Event()
        began = time.monotonic()

        def sample() -> None:
            while not done.wait(SAMPLE_EVERY_S):
                # A busy server answers late; the next sample makes up for it.
                with contextlib.suppress(httpx.TransportError):
                    text = httpx.get(f"{self.url}/metrics", timeout=10).text
                    samples.append({"at_s": time.monotonic() - began} | _gauges(text))

        thread = threading.Thread(target=sample, name=f"watch-{self.name}")
        thread.start()
        try:
            yield samples
        finally:
            done.set()
            thread.join()

    def stop(self) -> None:
        """End the server and what it started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_DEADLINE_S)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        lines = self._log.read_text("utf-8", "replace").splitlines()
        # vLLM names the root cause far above its last lines.
        causes = [line for line in lines if "Error: " in line] or lines
        tail = "\n".join(causes[-20:])
        raise SystemExit(f"The {self.name} server did not become ready:\n{tail}")


def _gauges(text: str) -> dict[str, float]:
    found = {}
    for key, name in GAUGES.items():
        match = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)
        found[key] = float(match[1]) if match else 0.0
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
