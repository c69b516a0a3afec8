# SPDX-License-Identifier: Apache-2.0
"""Ties to vLLM's frontend: nodes on its ``/metrics``, and an end together with it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.args import run_dir
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.memory_node.launcher import local_address
from vllm_attn_offload.metrics import StatsCollector
from vllm_attn_offload.protocol.messages import Stats
from vllm_attn_offload.transport.trust import Credentials

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

_SCRAPE_TIMEOUT_S = 1.0
_SHUTDOWN_TIMEOUT_S = 10.0
_collector: StatsCollector | None = None


class NodeStatsReader:
    """Asks memory nodes for their counters whenever Prometheus scrapes.

    It lives in the frontend's process, which has no channel to the workers, so it
    opens its own control connections.

    Args:
        addresses: Memory nodes of the engine.
        credentials: Files with the token and certificates.
    """

    def __init__(self, addresses: list[str], credentials: Credentials) -> None:
        self._addresses = addresses
        self._credentials = credentials
        self._clients: dict[str, ControlClient] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[str, Stats]:
        """Return counters by address, without nodes that do not answer."""
        with self._lock:
            answers = {address: self._read_node(address) for address in self._addresses}
        return {address: stats for address, stats in answers.items() if stats}

    def _read_node(self, address: str) -> Stats | None:
        try:
            if address not in self._clients:
                self._clients[address] = ControlClient(
                    address, _SCRAPE_TIMEOUT_S, self._credentials
                )
            return self._clients[address].stats()
        except MemoryNodeError as error:
            if client := self._clients.pop(address, None):
                client.close()
            logger.warning_once("no metrics from a memory node: %s", error)
            return None


def export_node_metrics(
    vllm_config: VllmConfig, config: AttentionOffloadConfig
) -> None:
    """Register an engine's nodes with Prometheus and drop those of an older engine.

    A stat-logger plugin would do the same but, by being installed, turns vLLM's
    statistics on even where ``--disable-log-stats`` was given and nothing is offloaded
    (vllm/v1/engine/async_llm.py).
    """
    global _collector
    if _collector is not None:
        REGISTRY.unregister(_collector)
    reader = NodeStatsReader(_addresses(vllm_config, config), config.credentials)
    _collector = StatsCollector(reader.read)
    REGISTRY.register(_collector)


def _addresses(vllm_config: VllmConfig, config: AttentionOffloadConfig) -> list[str]:
    """List the nodes of all engines behind this frontend."""
    if config.memory_nodes:
        return [*config.memory_nodes, *config.standby_nodes]
    parallel = vllm_config.parallel_config
    engines = range(parallel.data_parallel_size)
    if parallel.data_parallel_external_lb:
        engines = range(parallel.data_parallel_index, parallel.data_parallel_index + 1)
    local = [
        local_address(run_dir(engine, node))
        for engine in engines
        for node in range(config.num_local_nodes)
    ]
    return [*local, *config.standby_nodes]


def end_with_frontend() -> None:
    """End this engine when the process that started it is gone, even by kill -9.

    vLLM's engine waits for messages from its frontend and would wait for ever: workers,
    memory node and KV cache would stay. In the frontend's process this does nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=_watch_frontend,
            args=(parent.sentinel,),
            name="FrontendMonitor",
            daemon=True,
        ).start()


def _watch_frontend(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    logger.error("The frontend of this engine is gone. The engine stops.")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SHUTDOWN_TIMEOUT_S)
    # Workers and memory nodes watch this process and end with it.
    os._exit(1)
