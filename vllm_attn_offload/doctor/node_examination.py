# SPDX-License-Identifier: Apache-2.0
"""Everything that can be wrong with one memory node, asked of the node itself."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from statistics import median

from vllm_attn_offload import __version__
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.certificates import expiry_finding
from vllm_attn_offload.doctor.connection_problem import connection_problem
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.doctor.neighbourhood import shared_memory_finding
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.messages import GIB, NodeInfo, Stats
from vllm_attn_offload.transport.address import Address

_NUM_PINGS = 100
_PING_BUDGET_S = 2.0
#: A step waits for one round trip per layer; of 32 layers it would be 32 ms.
_SLOW_PING_S = 1e-3


class NodeExamination:
    """Asks one node, over a connection such as an engine's.

    Args:
        address: The node, as the user wrote it.
        case: What the engine would be.
    """

    def __init__(self, address: str, case: Case) -> None:
        self.address = address
        self._case = case
        self._stats: Stats | None = None
        self._has_ended = threading.Event()
        self._created = time.monotonic()

    @property
    def deadline_s(self) -> float:
        """Seconds that it may take: name server, connection, three answers, model."""
        model_s = max(0.0, self._case.shape_due - self._created)
        return 4 * self._case.timeout_s + 5 + (model_s if self._case.shape else 0.0)

    def answer(self) -> Stats | None:
        """Wait for the node's answer; None where there is none."""
        self._has_ended.wait(self.deadline_s)
        return self._stats

    def run(self) -> Iterator[Finding]:
        """Yield what is found, in the order in which it would go wrong."""
        try:
            yield from self._reach(Address.parse(self.address))
        finally:
            self._has_ended.set()

    def _reach(self, address: Address) -> Iterator[Finding]:
        if address.host:
            try:
                socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            except OSError as error:
                yield Finding.fail(
                    "name",
                    f"{address.host} has no address ({error.strerror or error})",
                    "a name that the name server or /etc/hosts of this host knows",
                    "Correct memory_nodes, or ask why the name is missing: getent "
                    f"hosts {address.host}",
                )
                return
        try:
            yield from self._ask(address)
        except MemoryNodeError as error:
            yield connection_problem(error)

    def _ask(self, address: Address) -> Iterator[Finding]:
        config, timeout_s = self._case.config, self._case.timeout_s
        with closing(
            ControlClient(self.address, timeout_s, config.credentials)
        ) as client:
            yield Finding.ok("connection", _description(client.info))
            yield from _version(client.info)
            yield self._round_trip(client)
            stats = self._stats = client.stats()
        if stats.certificate_expires:
            yield expiry_finding("the node's certificate", stats.certificate_expires)
        yield self._room(stats)
        yield shared_memory_finding(address, stats.node, self._case)

    def _round_trip(self, client: ControlClient) -> Finding:
        times: list[float] = []
        end = time.monotonic() + _PING_BUDGET_S
        while len(times) < _NUM_PINGS and time.monotonic() < end:
            start = time.perf_counter()
            client.ping(self._case.timeout_s)
            times.append(time.perf_counter() - start)
        middle, shortest = median(times), min(times)
        found = (
            f"{middle * 1e3:.2f} ms, the median of {len(times)}; "
            f"{shortest * 1e3:.2f} ms the shortest"
        )
        # The median of a busy host is its own fault; the network's is in all of them.
        if shortest <= _SLOW_PING_S:
            return Finding.ok("round trip", found)
        shape = self._case.model_shape()
        layers = f"{shape.num_layers}" if shape else "32"
        return Finding.warn(
            "round trip",
            f"{found}; a step of {layers} layers waits for {layers} of them",
            f"{_SLOW_PING_S * 1e3:g} ms at most, for offloading to pay",
            "Put the node nearer; vllm-attn-offload plan says what it costs.",
        )

    def _room(self, stats: Stats) -> Finding:
        """Compare what is free with the model and with kv_cache_gib."""
        free, total = stats.node.kv_bytes_free, stats.node.kv_bytes_total
        shape, wanted_gib = self._case.model_shape(), self._case.config.kv_cache_gib
        found = f"{byte_size(free)} of {byte_size(total)} are free"
        least = int((wanted_gib or 0) * GIB) or 1
        if shape is not None and shape.kv_bytes_per_token:
            num_tokens = int(free / shape.kv_bytes_per_token)
            bits = 8 * shape.kv_element_bytes
            found += f": {num_tokens:,} tokens of {shape.name} in {bits:g} bit"
            least = max(least, int(shape.kv_bytes_per_token))
        if free >= least:
            return Finding.ok("capacity", found)
        holders = _holders(stats)
        return Finding.fail(
            "capacity",
            f"{found}{holders and f'; {holders}'}",
            f"{byte_size(least)} that no engine holds",
            "Stop another engine of this node, give every engine a smaller "
            "kv_cache_gib, or start the node with a larger --kv-cache-gib.",
        )


def _description(info: NodeInfo) -> str:
    return f"{info.name}: {info.device}, kernel {info.attention_kernel}"


def _version(info: NodeInfo) -> Iterator[Finding]:
    if info.version != __version__:
        yield Finding.warn(
            "version",
            f"vllm-attn-offload {info.version} runs there, {__version__} here; they "
            "understand each other",
            "the same release on both sides",
            "Install the same release when you can.",
        )
    if info.device == "cpu" and info.attention_kernel.startswith("torch"):
        yield Finding.warn(
            "kernel",
            "the node attends with torch, which is slow",
            "its compiled kernel, cpp",
            "Run vllm-attn-offload doctor there: its C library is missing.",
        )


def _holders(stats: Stats) -> str:
    """Engines by what they hold."""
    held: dict[str, int] = {}
    for session in stats.sessions:
        name = (
            f"{session.engine} ({session.model})" if session.model else session.engine
        )
        held[name] = held.get(name, 0) + session.kv_bytes
    return ", ".join(f"{name} holds {byte_size(size)}" for name, size in held.items())
