# SPDX-License-Identifier: Apache-2.0
"""A ``vllm serve`` process of ``serving.py``, and a watch on its ``/metrics``."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from harness.serve_process import ServeProcess

SAMPLE_EVERY_S = 0.5
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_use": "vllm:kv_cache_usage_perc",
}


class MeasuredServer(ServeProcess):
    """``vllm serve`` under load, ready when constructed.

    Args:
        engine: Shown in the table.
        model: Model to serve.
        options: More of the command line.
        variables: Added to the environment.
        log: File that its output is appended to.
    """

    start_timeout_s = 600.0
    stop_timeout_s = 60.0

    def __init__(
        self,
        engine: str,
        model: str,
        options: list[str],
        variables: dict[str, str],
        log: Path,
    ) -> None:
        self.engine = engine
        offline = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        super().__init__(model, log, *options, **offline | variables)

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

        thread = threading.Thread(target=sample, name=f"watch-{self.engine}")
        thread.start()
        try:
            yield samples
        finally:
            done.set()
            thread.join()

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """End the server and what it started."""
        self.footprint.look()
        status = super().stop(signum)
        self.kill_all()
        return status


def _gauges(text: str) -> dict[str, float]:
    found = {}
    for key, name in GAUGES.items():
        match = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)
        found[key] = float(match[1]) if match else 0.0
    return found
