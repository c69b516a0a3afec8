# SPDX-License-Identifier: Apache-2.0
"""Engines whose memory nodes are Ray's: tokens are stock vLLM's, whatever is killed."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import tiny_llama
from harness.faults import IS_BACK, Streams
from harness.serve_process import ServeProcess
from node_process import eventually
from ray_cluster import RayCluster
from ray_pools import (
    GONE_WITHIN_S,
    KV_GIB,
    has_ended,
    order,
    process_of,
    shared,
    stats,
)

from vllm_attn_offload.ray_nodes.shared_pool import SharedPool

NEXT_TOKEN_WITHIN_S = 10.0
NUM_STREAMS, NUM_TOKENS = 16, 160
PROMPTS = [list(range(100 + 7 * index, 140 + 7 * index)) for index in range(16)]

pytestmark = pytest.mark.long


def serve(model: str, log: Path, **offload: Any) -> ServeProcess:
    """A server of the tiny model whose memory nodes are Ray's."""
    return ServeProcess(
        model,
        log,
        *("--attention-offload", "--enforce-eager", "--dtype", "float32"),
        *("--attention-offload-config", json.dumps(offload)),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN)),
        *("--max-num-seqs", str(NUM_STREAMS)),
        *("--block-size", str(tiny_llama.BLOCK_SIZE)),
    )


def up_nodes(server: ServeProcess) -> set[str]:
    """Addresses of the nodes that ``/metrics`` shows as running."""
    text = server.metrics()
    up = set(re.findall(r'memory_node_up\{node="([^"]+)"\} 1\.0', text))
    return {
        re.findall(r'address="([^"]+)"', labels)[0]
        for labels in re.findall(r"memory_node_info\{(.*)\} 1\.0", text)
        if re.findall(r'node="([^"]+)"', labels)[0] in up
    }


def ask(server: ServeProcess) -> list[list[int]]:
    """Tokens of the prompts whose answers of stock vLLM are known."""
    choices = server.complete(tiny_llama.PROMPTS, tiny_llama.NUM_TOKENS)
    return [choice["token_ids"] for choice in choices]


def node_on(address: str) -> tuple[psutil.Process, str]:
    """Process of a node that listens there, and the id of its host in Ray."""
    port = int(address.rpartition(":")[2])
    (pid,) = {
        each.pid
        for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    }
    node = psutil.Process(pid)
    raylet = node.parent().parent().cmdline()
    (host_id,) = (part for part in raylet if part.startswith("--node_id="))
    return node, host_id.removeprefix("--node_id=")


def test_engine_with_nodes_of_its_own(
    ray_cluster: RayCluster,
    tiny_model: str,
    tiny_tokens: list[list[int]],
    tmp_path: Path,
) -> None:
    """Its answers are stock vLLM's, also when a host dies; nodes die with it."""
    server = serve(
        tiny_model, tmp_path / "log", memory_nodes="ray", kv_cache_gib=KV_GIB
    )
    with ExitStack() as stack:
        stack.callback(server.kill_all)
        assert ask(server) == tiny_tokens
        assert eventually(lambda: len(up_nodes(server)) == 1, 30)
        (before,) = up_nodes(server)
        token_times_s: list[float] = []

        def streams() -> Streams:
            return Streams(
                *(server.url, tiny_model, PROMPTS, NUM_TOKENS),
                on_token=lambda: token_times_s.append(time.monotonic()),
            )

        expected = streams().finish(120)
        _, lost = node_on(before)
        disturbed = streams()
        assert disturbed.wait_for(NUM_STREAMS * NUM_TOKENS // 4, 60)
        killed_s = time.monotonic()
        ray_cluster.kill_host(lost)
        assert disturbed.finish(120) == expected
        times_s = sorted(token_times_s)
        gap_s = max(
            b - a for a, b in zip(times_s, times_s[1:], strict=False) if b > killed_s
        )
        sys.stdout.write(
            f"longest time without a token after the kill: {gap_s:.2f} s\n"
        )
        assert IS_BACK in server.log.read_text()
        assert gap_s < NEXT_TOKEN_WITHIN_S
        assert eventually(lambda: up_nodes(server) - {before}, 30)
        (after,) = up_nodes(server)
        node, host_id = node_on(after)
        assert host_id != lost
        ray_cluster.replace_host(lost)
        engine = next(p for p in server.children if "EngineCore" in p.name())
        engine.kill()
        killed_s = time.monotonic()
        assert eventually(lambda: has_ended(node), GONE_WITHIN_S)
        sys.stdout.write(
            f"node gone {time.monotonic() - killed_s:.2f} s after its engine\n"
        )


def test_engines_share_a_pool(
    ray_cluster: RayCluster,
    tiny_model: str,
    tiny_tokens: list[list[int]],
    tmp_path: Path,
) -> None:
    """One is killed, the other is terminated; the pool stays and frees their memory."""
    SharedPool("both").up(2, order())
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        stack.callback(SharedPool("both").down)
        start = [
            threads.submit(
                serve,
                *(tiny_model, tmp_path / f"{index}.log"),
                memory_nodes="ray:both",
                kv_cache_gib=KV_GIB / 2,
            )
            for index in range(2)
        ]
        one, other = (each.result() for each in start)
        for server in (one, other):
            stack.callback(server.kill_all)
        for tokens in threads.map(ask, (one, other)):
            assert tokens == tiny_tokens
        nodes = shared("both")
        assert all(len(stats(node).sessions) == 2 for node in nodes)
        addresses = {node.address for node in nodes}
        assert eventually(lambda: up_nodes(one) == addresses, 30)
        for child in one.children:
            child.kill()
        one.process.kill()
        assert eventually(lambda: all(len(stats(n).sessions) == 1 for n in nodes), 30)
        process_of(nodes[0]).kill()
        assert ask(other) == tiny_tokens
        assert other.end(signal.SIGTERM) == []
        assert other.process.returncode == 0
        left = shared("both")
        assert eventually(lambda: not any(stats(node).sessions for node in left), 30)
