# SPDX-License-Identifier: Apache-2.0
"""One memory node of an engine: its process where it is local, its control channel."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
from vllm_attn_offload.protocol.messages import (
    GIB,
    CapacityReserved,
    NodeInfo,
    OpenSession,
    ReserveCapacity,
    SessionOpened,
)

#: Starts a local node that holds so many GiB (None: its default).
Launch = Callable[[float | None], MemoryNodeProcess]
#: Opens a control channel to an address within so many seconds.
Connect = Callable[[str, float], ControlClient]

_HEARTBEATS_PER_TIMEOUT = 4
_MAX_HEARTBEAT_S = 1.0


class NodeHandle:
    """A node that the engine starts, or one that runs already.

    Args:
        source: The address of a running node, or what starts a local one.
        connect: Opens control channels.
        request_timeout_s: A node that is silent for so long is lost.
    """

    def __init__(
        self, source: str | Launch, connect: Connect, request_timeout_s: float
    ) -> None:
        self.source = source
        self.address = source if isinstance(source, str) else "of this host"
        self.is_lost = False
        self._is_leaving = False
        self._connect = connect
        self._timeout_s = request_timeout_s
        # Watcher and recovery may find a node lost at the same time.
        self._lock = threading.Lock()
        self._process: MemoryNodeProcess | None = None
        self._control: ControlClient | None = None
        self._reserved: list[str] = []
        self._total_gib: float | None = None

    @property
    def info(self) -> NodeInfo:
        """What the node is, and what was free when it was last asked."""
        return self._channel().info

    @property
    def pid(self) -> int | None:
        """Process id of a local node."""
        return self._process.pid if self._process else None

    def join(self, kv_cache_gib: float | None, timeout_s: float) -> None:
        """Start the node or connect to it.

        Args:
            kv_cache_gib: Budget of a node that is started; None for its default. One
                that is started again has what it had.
            timeout_s: Deadline of the connection.

        Raises:
            MemoryNodeError: It does not start, or nobody answers there.
        """
        self.start(kv_cache_gib)
        with self._lock:
            self._control = self._connect(self.address, timeout_s)
            self._total_gib = self._control.info.kv_bytes_total / GIB
            self.is_lost = False

    def start(self, kv_cache_gib: float | None) -> None:
        """Start the process of a local node, if there is none yet.

        Raises:
            MemoryNodeError: It ends or is not ready in time.
        """
        with self._lock:
            if not isinstance(self.source, str) and self._process is None:
                self._process = self.source(self._total_gib or kv_cache_gib)
                self.address = self._process.address

    def refresh_info(self) -> NodeInfo:
        """Ask what is free now."""
        return self._channel().refresh_info()

    def reserve(self, request: ReserveCapacity) -> CapacityReserved:
        """Hold memory until ``release``, ``lose`` or ``close``."""
        reserved = self._channel().reserve(request)
        self._reserved.append(reserved.reservation)
        return reserved

    def open_session(self, request: OpenSession) -> SessionOpened:
        """Turn a reservation into a pool."""
        return self._channel().open_session(request)

    def release(self) -> None:
        """Give back all that is reserved; data channels to it end."""
        while self._reserved:
            self._channel().close_session(self._reserved.pop())

    def watch(self, on_loss: Callable[[MemoryNodeError], None]) -> None:
        """Report when this connection is lost, once, from a thread.

        Args:
            on_loss: Gets the reason; the node is marked as lost before.
        """
        threading.Thread(
            target=self._watch,
            args=(self._channel(), on_loss),
            name="MemoryNodeMonitor",
            daemon=True,
        ).start()

    def check(self) -> None:
        """Mark the node as lost where it does not answer."""
        control = self._control
        if control is not None:
            try:
                control.ping(self._timeout_s)
            except MemoryNodeError:
                self.lose(control)

    def lose(self, control: ControlClient | None = None) -> bool:
        """Cut all ties: what the node holds is worthless, and it may wake up again.

        Args:
            control: Do so only where this is still the connection in use.

        Returns:
            Whether it was done.
        """
        with self._lock:
            if control is not None and control is not self._control:
                return False
            self.is_lost = True
            self._reserved.clear()
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._process is not None:
                self._process.kill()
                self._process = None
            return True

    def request_stop(self) -> None:
        """Ask a local node to end, without waiting for it; losing it is no news."""
        self._is_leaving = True
        if self._process is not None:
            self._process.request_stop()

    def close(self) -> None:
        """Leave the node, or end it where it is local. Safe to call twice."""
        control, self._control = self._control, None
        if control is not None:
            control.close()
        if self._process is not None:
            self._process.stop()

    def _channel(self) -> ControlClient:
        control = self._control
        if control is None:
            raise MemoryNodeError(self.address, "there is no connection to it.")
        return control

    def _watch(
        self, control: ControlClient, on_loss: Callable[[MemoryNodeError], None]
    ) -> None:
        cause = "the connection was closed there."
        interval_s = min(_MAX_HEARTBEAT_S, self._timeout_s / _HEARTBEATS_PER_TIMEOUT)
        with contextlib.suppress(OSError, ValueError):  # closed by us meanwhile
            while not control.wait_until_lost(interval_s):
                try:
                    control.ping(self._timeout_s - interval_s)
                except MemoryNodeError as error:
                    cause = error.cause
                    break
        if not self._is_leaving and self.lose(control):
            on_loss(MemoryNodeError(self.address, f"it was lost: {cause}"))
