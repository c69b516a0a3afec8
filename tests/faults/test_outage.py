# SPDX-License-Identifier: Apache-2.0
"""A server whose memory node stays away: it says so, and does not end with success."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import httpx
import pytest
from harness import faults, tiny_llama
from harness.serve_process import ServeProcess
from node_process import eventually, running_node

RECOVERY_S, GRACE_S = 14.0, 2.0

pytestmark = pytest.mark.long


def test_server_without_its_node(tmp_path: Path) -> None:
    tiny_llama.save(tmp_path)
    one_cpu = str(max(os.sched_getaffinity(0)))
    with running_node(tmp_path, "--kv-cache-gib", "0.1", "--cpus", one_cpu) as node:
        config = {
            "memory_nodes": [node.address],
            "recovery_timeout_s": RECOVERY_S,
            "unavailable_grace_s": GRACE_S,
        }
        server = ServeProcess(
            str(tmp_path),
            tmp_path / "serve.log",
            *("--attention-offload", "--attention-offload-config", json.dumps(config)),
            *("--enforce-eager", "--dtype", "float32", "--skip-tokenizer-init"),
            *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--block-size", "32"),
        )
        try:
            node.kill()
            check_outage(server, node.address)
        finally:
            server.kill_all()


def check_outage(server: ServeProcess, address: str) -> None:
    waiting = faults.Streams(server.url, server.model, tiny_llama.PROMPTS, 20)
    assert eventually(lambda: health(server).status_code == 503, GRACE_S)
    assert f"Memory node {address} is away" in health(server).text
    time.sleep(GRACE_S)
    refused = complete(server)
    assert refused.status_code == 503
    assert 1 <= int(refused.headers["Retry-After"]) <= 10
    away = f"memory node {address} is away for 10 s"
    assert eventually(lambda: away in server.log.read_text("utf-8"), RECOVERY_S)
    assert waiting.errors == []
    assert server.process.wait(60) == 1
    assert "The server ends with status 1" in server.log.read_text("utf-8")
    assert eventually(lambda: server.leftovers() == [], 20)


def health(server: ServeProcess) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=5)


def complete(server: ServeProcess) -> httpx.Response:
    body = {"model": server.model, "prompt": [11], "max_tokens": 4}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
