# SPDX-License-Identifier: Apache-2.0
"""A server whose memory node stays away: it says so, and does not end with success.

Answers, logs, metrics and traces say so, too.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from harness import faults, tiny_llama
from harness.serve_process import ServeProcess
from node_process import eventually, running_node
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from span_receiver import SpanReceiver, attributes, span_receiver

from vllm_attn_offload.client.control_client import ControlClient

RECOVERY_S, GRACE_S = 14.0, 2.0
UP = "memory_node_up{node="

pytestmark = pytest.mark.long


def test_server_without_its_node(tmp_path: Path) -> None:
    tiny_llama.save(tmp_path)
    one_cpu = str(max(os.sched_getaffinity(0)))
    with (
        span_receiver() as receiver,
        running_node(tmp_path, "--kv-cache-gib", "0.1", "--cpus", one_cpu) as node,
    ):
        with closing(ControlClient(node.address, 5)) as client:
            name = client.info.name
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
            *("--otlp-traces-endpoint", receiver.url),
            **receiver.variables,
        )
        try:
            assert eventually(lambda: value(server, f'{UP}"{name}"}}') == 1, 30)
            assert value(server, "engine_recovering{.*}") == 0
            node.kill()
            check_outage(server, node.address, name)
            check_traces(receiver, node.address)
        finally:
            server.kill_all()


def check_outage(server: ServeProcess, address: str, name: str) -> None:
    waiting = faults.Streams(server.url, server.model, tiny_llama.PROMPTS, 20)
    assert eventually(lambda: health(server).status_code == 503, GRACE_S)
    assert f"Memory node {address} is away" in health(server).text
    assert value(server, f'{UP}"{name}"}}') == 0
    assert value(server, "engine_recovering{.*}") == 1
    assert value(server, "engine_recoveries_total{.*}") == 0
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


def check_traces(receiver: SpanReceiver, address: str) -> None:
    (join,) = receiver.named("attn_offload.join")
    assert attributes(join)["attn_offload.nodes"] == [address]
    assert join.parent_span_id  # vLLM's own span of the executor's start
    assert eventually(lambda: receiver.named("attn_offload.recovery"), 20)
    (recovery,) = receiver.named("attn_offload.recovery")
    assert recovery.status.code == Status.STATUS_CODE_ERROR
    assert "it was not back in time" in recovery.status.message
    assert attributes(recovery)["attn_offload.seconds"] > RECOVERY_S - 1


def value(server: ServeProcess, pattern: str) -> float:
    """The value of one of our series, by its name and labels."""
    (found,) = re.findall(f"^attn_offload:{pattern} (.*)$", server.metrics(), re.M)
    return float(found)


def health(server: ServeProcess) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=5)


def complete(server: ServeProcess) -> httpx.Response:
    body = {"model": server.model, "prompt": [11], "max_tokens": 4}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
