# SPDX-License-Identifier: Apache-2.0
"""Runs the checks that import vLLM, in a process that may crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.doctor.model_size import config_directory

_MODULE = "vllm_attn_offload.doctor.engine_checks"


class EngineProcess:
    """Relays what `engine_checks` finds, line by line.

    Args:
        case: What the engine would be.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._has_ended = threading.Event()
        self._max_model_len = 0

    def max_model_len(self) -> int:
        """Tokens of the longest request, once it is known; 0 where it is not."""
        if self._case.is_engine_host:
            self._has_ended.wait()
        return self._max_model_len

    def run(self) -> Iterator[Finding]:
        """Yield findings as they come; a crash is one, too."""
        try:
            yield from self._relay()
        finally:
            self._has_ended.set()

    def _relay(self) -> Iterator[Finding]:
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"},
            )
            try:
                yield from self._findings_of(child)
            finally:
                child.kill()
                child.wait()
            if child.returncode != 0:
                yield _crash(child.returncode, said)

    def _findings_of(self, child: subprocess.Popen[str]) -> Iterator[Finding]:
        assert child.stdin is not None
        assert child.stdout is not None
        with child.stdin as stdin, child.stdout as stdout:
            stdin.write(json.dumps(self._request()))
            stdin.close()
            for line in stdout:
                reply = json.loads(line)
                if "max_model_len" in reply:
                    self._max_model_len = reply["max_model_len"]
                else:
                    yield Finding(**reply)
        child.wait()

    def _request(self) -> dict[str, Any]:
        return {
            "model": config_directory(self._case.model),
            "options": self._case.options,
            "engine_options": self._case.engine_options,
            "parent": os.getpid(),
        }


def _crash(status: int, said: Any) -> Finding:
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    return Finding.fail(
        "vLLM",
        f"a process that used it ended with {ended}: {last[:300]}",
        "a vLLM that can be imported",
        "Run: python -c 'import vllm.engine.arg_utils', and install what it misses.",
    )
