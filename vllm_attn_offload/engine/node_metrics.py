# SPDX-License-Identifier: Apache-2.0
"""Memory nodes and engines on vLLM's ``/metrics``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.registry import Collector

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.args import run_dir
from vllm_attn_offload.engine.engine_board import EngineBoard
from vllm_attn_offload.engine.node_board import NodeBoard
from vllm_attn_offload.engine.slot_board import SlotBoard
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.memory_node.launcher import local_address
from vllm_attn_offload.metrics import EngineCollector, StatsCollector
from vllm_attn_offload.protocol.messages import Stats
from vllm_attn_offload.transport.trust import Credentials

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

_SCRAPE_TIMEOUT_S = 1.0
#: Hosts that do not answer keep one each; it is made when it is needed.
_MAX_THREADS = 128
_exported: _Exported | None = None


class _Exported(NamedTuple):
    """What an engine added to Prometheus' registry."""

    reader: NodeStatsReader
    collectors: Sequence[Collector]
    boards: Sequence[SlotBoard]

    def drop(self) -> None:
        """Take it out again and let go of nodes and boards."""
        for collector in self.collectors:
            REGISTRY.unregister(collector)
        self.reader.close()
        for board in self.boards:
            board.close()


class NodeStatsReader:
    """Asks all memory nodes at once for their counters whenever Prometheus scrapes.

    It lives in an API server's process, which has no channel to the workers, so it
    opens its own control connections.

    Args:
        nodes: Returns the memory nodes of the engine, and what each asks for.
    """

    def __init__(self, nodes: Callable[[], Mapping[str, Credentials]]) -> None:
        self._nodes = nodes
        self._clients: dict[str, ControlClient] = {}
        self._threads = ThreadPoolExecutor(_MAX_THREADS, "MemoryNodeStats")
        self._asked: dict[str, Future[Stats | None]] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[str, Stats | None]:
        """Return counters by address; None of a node without an answer in a second."""
        with self._lock:
            nodes = self._nodes()
            for address, credentials in nodes.items():
                asked = self._asked.get(address)
                # One that is still being asked is not asked twice.
                if asked is None or asked.done():
                    asked = self._threads.submit(self._read_node, address, credentials)
                    self._asked[address] = asked
            # Threads add and remove clients meanwhile.
            for gone in self._clients.copy().keys() - nodes.keys():
                if client := self._clients.pop(gone, None):
                    client.close()
            asked_now = {address: self._asked[address] for address in nodes}
            answered, _ = wait(asked_now.values(), _SCRAPE_TIMEOUT_S)
            return {
                address: asked.result() if asked in answered else None
                for address, asked in asked_now.items()
            }

    def close(self) -> None:
        """Let go of the nodes; a thread that waits for one ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for client in list(self._clients.values()):
            client.close()

    def _read_node(self, address: str, credentials: Credentials) -> Stats | None:
        try:
            client = self._clients.get(address)
            if client is None:
                client = ControlClient(address, _SCRAPE_TIMEOUT_S, credentials)
                self._clients[address] = client
            return client.stats()
        except MemoryNodeError as error:
            if failed := self._clients.pop(address, None):
                failed.close()
            logger.warning_once("no metrics from a memory node: %s", error)
            return None


def export_node_metrics(
    vllm_config: VllmConfig, config: AttentionOffloadConfig
) -> None:
    """Register an engine and its nodes with Prometheus and drop an older engine's.

    A stat-logger plugin would do the same but, by being installed, turns vLLM's
    statistics on even where ``--disable-log-stats`` was given and nothing is offloaded
    (vllm/v1/engine/async_llm.py).
    """
    global _exported
    drop_exported()
    found = None if config.ray_pool is None else NodeBoard.find()
    reader = NodeStatsReader(_nodes(vllm_config, config, found))
    collectors: list[Collector] = [StatsCollector(reader.read)]
    engines = EngineBoard.find()
    if engines is not None:
        collectors.append(EngineCollector(engines.read))
    boards = [board for board in (found, engines) if board is not None]
    _exported = _Exported(reader, collectors, boards)
    register_exported(REGISTRY)


def drop_exported() -> None:
    """Let go of the nodes and boards of this process's engine, if it has one."""
    global _exported
    if _exported is not None:
        _exported.drop()
        _exported = None


def register_exported(registry: CollectorRegistry) -> None:
    """Add what this process exports, where it has an engine that offloads."""
    if _exported is not None:
        for collector in _exported.collectors:
            registry.register(collector)


def _nodes(
    vllm_config: VllmConfig, config: AttentionOffloadConfig, board: NodeBoard | None
) -> Callable[[], Mapping[str, Credentials]]:
    credentials = config.credentials
    known = dict.fromkeys(_addresses(vllm_config, config), credentials)
    if board is None:
        return lambda: known

    def found() -> Mapping[str, Credentials]:
        nodes = board.read()
        return known | {
            node.address: credentials.with_token(node.auth_token) for node in nodes
        }

    return found


def _addresses(vllm_config: VllmConfig, config: AttentionOffloadConfig) -> list[str]:
    """List the nodes of all engines behind this frontend whose addresses are fixed."""
    if config.ray_pool is not None:
        return [*config.standby_nodes]
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
