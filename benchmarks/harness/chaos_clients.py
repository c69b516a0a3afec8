# SPDX-License-Identifier: Apache-2.0
"""The clients of ``chaos.py``, which compare every answer."""

from __future__ import annotations

import threading
import time

from harness import faults
from harness.chaos_report import Report
from harness.serve_process import ServeProcess

REQUEST_DEADLINE_S = 300.0


class Clients:
    """Keeps so many streams busy and compares every answer with the undisturbed one.

    Args:
        server: Server that is asked.
        prompts: Token ids, sent in turn.
        num_tokens: Tokens of every answer.
        report: Filled.
    """

    def __init__(
        self,
        server: ServeProcess,
        prompts: list[list[int]],
        num_tokens: int,
        report: Report,
    ) -> None:
        self._server, self._prompts, self._num_tokens = server, prompts, num_tokens
        self._report = report
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.token_times_s: list[float] = []
        self._expected = self._ask(prompts)

    def start(self, num_streams: int) -> None:
        """Begin to ask."""
        self._threads = [
            threading.Thread(target=self._work, args=(index,), daemon=True)
            for index in range(num_streams)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the running requests end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(REQUEST_DEADLINE_S)
        if any(thread.is_alive() for thread in self._threads):
            self._report.failed.append("a stream did not end")

    def _work(self, index: int) -> None:
        while not self._stopping.is_set():
            number = index % len(self._prompts)
            index += 1
            try:
                (tokens,) = self._ask([self._prompts[number]])
            except AssertionError as error:
                self._report.failed.append(str(error) or "no end")
                continue
            with self._lock:
                self._report.requests += 1
                self._report.tokens += len(tokens)
                if tokens != self._expected[number]:
                    self._report.wrong.append(f"prompt {number}: {tokens}")

    def _ask(self, prompts: list[list[int]]) -> list[list[int]]:
        return faults.Streams(
            self._server.url,
            self._server.model,
            prompts,
            self._num_tokens,
            on_token=self._note_token,
        ).finish(REQUEST_DEADLINE_S)

    def _note_token(self) -> None:
        self.token_times_s.append(time.monotonic())
