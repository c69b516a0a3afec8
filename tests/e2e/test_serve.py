# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --attention-offload`` against stock vLLM, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import workload
from equality import assert_close_bf16, assert_identical
from harness.serve_process import ServeProcess

from vllm_attn_offload.cpu_list import parse_cpu_list

Generated = Callable[[str, str], dict[str, Any]]
Server = Callable[[str], ServeProcess]

pytestmark = pytest.mark.long


def _greedy(server: ServeProcess, dtype: str) -> list[dict[str, Any]]:
    first, second = workload.prompts(server.model, dtype)
    choices = [
        choice
        for prompts in (first, second)
        for choice in server.complete(prompts, workload.NUM_TOKENS)
    ]
    return [
        {
            "tokens": choice["token_ids"],
            "logprobs": choice["logprobs"]["token_logprobs"],
        }
        for choice in choices
    ]


def test_serve_float32_is_identical(server: Server, generated: Generated) -> None:
    offload = _greedy(server("float32"), "float32")
    assert_identical(generated("float32", "stock")["greedy"], offload)


def test_serve_exports_metrics(server: Server) -> None:
    """vLLM's /metrics shows the remote pool and what was exchanged."""
    process = server("float32")
    process.complete(workload.prompts(process.model, "float32")[0][:1], 2)
    text = process.metrics()
    values = {
        name: float(value)
        for name, value in re.findall(r"^(attn_offload:\w+)\{.*\} (\S+)$", text, re.M)
    }
    block_bytes = 30 * 2 * workload.BLOCK_TOKENS * 3 * 64 * 4
    num_blocks = int(workload.SERVE_KV_GIB * (1 << 30)) // block_bytes
    assert values["attn_offload:memory_node_kv_blocks"] == num_blocks
    assert values["attn_offload:compute_worker_kv_bytes"] == block_bytes
    assert values["attn_offload:bytes_sent_total"] > 0
    assert values["attn_offload:bytes_received_total"] > 0
    assert re.search(rf'num_gpu_blocks="{num_blocks}"', text)
    (placement,) = re.findall(r"^attn_offload:placement_info\{(.*)\} 1\.0$", text, re.M)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', placement))
    # Of one rank; where no user binds it, it takes turns with its node.
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    assert labels["cpus"] == ("divided" if bound else "shared")
    allowed = parse_cpu_list(bound or labels["node_cpus"])
    assert set(parse_cpu_list(labels["worker_cpus"])) <= set(allowed)


def test_status_finds_nodes_and_engines(server: Server) -> None:
    """From the server's URL alone."""
    process = server("float32")
    command = Path(sys.executable).with_name("vllm-attn-offload")
    done = subprocess.run(
        [command, "status", "--engine", process.url, "--json", "--timeout-s", "30"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    (node,) = document["nodes"]
    assert node["address"].startswith("unix:")
    assert node["state"] == "serving"
    (session,) = node["stats"]["sessions"]
    (engine,) = document["engines"]
    assert engine["pool_blocks"] == session["num_blocks"]
    assert engine["model_name"] == session["model"]
    assert engine["generation"] == session["generation"] == 0
    assert (engine["recovering"], engine["recoveries"]) == (0, 0)


def test_serve_pool_is_larger_than_stock_accepts(server: Server) -> None:
    """Limits of the compute host do not limit the pool that the node holds."""
    server("float32")
    limit = workload.SERVE_MEMORY_UTILIZATION * psutil.virtual_memory().total
    assert limit < workload.SERVE_KV_GIB * (1 << 30)


def test_serve_ends_on_interrupt(server: Server) -> None:
    """Ctrl-C leaves no process, socket or shared memory behind."""
    running = server("float32")
    assert running.memory_node().is_running()
    assert running.end(signal.SIGINT) == []


def test_serve_bfloat16_is_close(
    server: Server, generated: Generated, capsys: pytest.CaptureFixture[str]
) -> None:
    offload = _greedy(server("bfloat16"), "bfloat16")
    report = assert_close_bf16(generated("bfloat16", "stock")["greedy"], offload)
    with capsys.disabled():
        print(f"\nvllm serve, {report}")  # noqa: T201


def test_serve_ends_on_kill(server: Server) -> None:
    """kill -9 of the API server leaves nothing behind either."""
    running = server("bfloat16")
    assert any("attn-offload-" in path for path in running.leftovers())
    assert running.end(signal.SIGKILL) == []
