# SPDX-License-Identifier: Apache-2.0
"""Several engines on one pool: two servers, of which one has data-parallel ranks."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import tiny_llama
from harness.serve_process import ServeProcess
from node_process import NodeProcess

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.protocol.session_stats import SessionStats

NUM_NODES, NUM_RANKS, ROUNDS = 2, 2, 4
#: Much less on a host where nothing else runs.
FREED_WITHIN_S = 30.0

pytestmark = pytest.mark.long


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[str]]:
    """Addresses of a pool whose unwritten blocks hold NaN; one has a Unix socket."""
    with ExitStack() as stack:
        addresses = []
        for index in range(NUM_NODES):
            unix = ("--listen", f"unix:{tmp_path / 'node.sock'}")
            node = NodeProcess(
                "127.0.0.1:0",
                tmp_path / f"node-{index}.log",
                *("--kv-cache-gib", "0.1"),
                *(() if index else unix),
                ATTN_OFFLOAD_POISON_KV="1",
            )
            stack.callback(node.kill)
            addresses.append(node.address)
        yield addresses


def sessions(address: str) -> list[SessionStats]:
    """What a node tells of its sessions."""
    client = ControlClient(address, timeout_s=10)
    try:
        return client.stats().sessions
    finally:
        client.close()


def wait_for_sessions(nodes: list[str], at_most: int) -> None:
    """Wait until every node has freed what the killed held."""
    deadline = time.monotonic() + FREED_WITHIN_S
    while any(len(sessions(node)) > at_most for node in nodes):
        assert time.monotonic() < deadline, "the killed kept their sessions"
        time.sleep(0.1)


def serve(
    model: str, nodes: list[str], partition: str, log: Path, *options: str
) -> ServeProcess:
    """A server on the pool."""
    offload = {"memory_nodes": nodes, "partition": partition, "kv_cache_gib": 0.02}
    return ServeProcess(
        model,
        log,
        *("--attention-offload", "--enforce-eager", "--dtype", "float32"),
        *("--attention-offload-config", json.dumps(offload)),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--max-num-seqs", "4"),
        *("--block-size", str(tiny_llama.BLOCK_SIZE), *options),
        # Not "auto", which wants a core for each rank.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )


def test_engines_share_a_pool(
    tiny_model: str, tiny_tokens: list[list[int]], nodes: list[str], tmp_path: Path
) -> None:
    """Each answers as stock vLLM while all are busy; the killed free their share."""
    ranks = ("--data-parallel-size", str(NUM_RANKS))
    plans = [
        (tiny_model, nodes, "blocks", tmp_path / "ranks.log", *ranks),
        (tiny_model, nodes, "heads", tmp_path / "alone.log"),
    ]
    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        servers = list(pool.map(lambda plan: serve(*plan), plans))
        for server in servers:
            stack.callback(server.kill_all)

        def ask(server: ServeProcess) -> list[list[int]]:
            choices = server.complete(tiny_llama.PROMPTS, tiny_llama.NUM_TOKENS)
            return [choice["token_ids"] for choice in choices]

        for answer in pool.map(ask, servers * ROUNDS):
            assert answer == tiny_tokens
        for node, transport in zip(nodes, ("shared memory", "tcp"), strict=True):
            found = sessions(node)
            assert {session.transport for session in found} == {transport}
            assert {session.model for session in found} == {tiny_model}
            assert sorted(session.engine_index for session in found) == [0, 0, 1]
            assert all(session.counters.worker_wait_s > 0 for session in found)
            assert len(found) == NUM_RANKS + 1
            assert len({session.engine for session in found}) == NUM_RANKS + 1
            assert all(session.counters.num_layer_calls > 0 for session in found)

        ranks_server, alone = servers
        worker = next(
            child for child in ranks_server.children if "Worker" in child.cmdline()[0]
        )
        worker.kill()
        wait_for_sessions(nodes, NUM_RANKS)
        ranks_server.process.send_signal(signal.SIGKILL)
        wait_for_sessions(nodes, 1)
        assert ask(alone) == tiny_tokens
