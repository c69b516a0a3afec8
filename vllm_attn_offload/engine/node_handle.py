# SPDX-License-Identifier: Apache-2.0
"""One memory node of an engine: its process, its control channel, what it holds."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable

from vllm_attn_offload.client.attachment import Attachment
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.engine.node_launch import Launch, LaunchedNode
from vllm_attn_offload.engine.rank_share import RankShare
from vllm_attn_offload.engine.session_limits import SessionLimits
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.messages import (
    GIB,
    NodeInfo,
    OpenSession,
    ReserveCapacity,
)
from vllm_attn_offload.transport.trust import Credentials

#: Opens a control channel to an address, with a timeout in seconds.
Connect = Callable[[str, float, Credentials], ControlClient]

_HEARTBEATS_PER_TIMEOUT = 4
_MAX_HEARTBEAT_S = 1.0


class NodeHandle:
    """A memory node that the engine starts or finds, or one at a known address.

    Methods that talk to the node raise MemoryNodeError if it does not start, is lost or
    refuses the request.

    Args:
        source: The address of a running node, or a function that starts or finds one.
        connect: Opens control channels.
        credentials: What to show the node, and to ask of it.
        request_timeout_s: A node that is silent for longer is lost.
    """

    def __init__(
        self,
        source: str | Launch,
        connect: Connect,
        credentials: Credentials,
        request_timeout_s: float,
    ) -> None:
        self.source = source
        self.address = source if isinstance(source, str) else "that is to be started"
        self.is_lost = False
        self._is_leaving = False
        self._connect = connect
        self._credentials = credentials
        self._auth_token = b""
        self._timeout_s = request_timeout_s
        # Watcher and recovery may find a node lost at the same time.
        self._lock = threading.Lock()
        self._process: LaunchedNode | None = None
        self._killed: LaunchedNode | None = None
        self._control: ControlClient | None = None
        self._on_loss: Callable[[MemoryNodeError], None] | None = None
        self._cause = "there is no connection to it."
        self._shares: list[RankShare] = []
        self._reservations: list[str] = []
        self._total_gib: float | None = None

    @property
    def info(self) -> NodeInfo:
        """Device and kernel of the node, and its free memory when last asked."""
        return self._channel().info

    @property
    def pid(self) -> int | None:
        """Process id, if the node is local and runs."""
        return self._process.pid if self._process else None

    @property
    def num_blocks(self) -> list[int]:
        """Reserved blocks, per rank."""
        return [share.num_reserved for share in self._shares]

    @property
    def kv_bytes(self) -> int:
        """Reserved memory of all ranks."""
        return sum(share.request.kv_bytes for share in self._shares)

    def join(self, timeout_s: float) -> None:
        """Start or find the node, then connect within ``timeout_s``."""
        self.start()
        trusted = self._credentials.with_token(self._auth_token)
        with self._lock:
            self._control = self._connect(self.address, timeout_s, trusted)
            self._total_gib = self._control.info.kv_bytes_total / GIB
            self.is_lost = False
            threading.Thread(
                target=self._monitor,
                args=(self._control,),
                name="MemoryNodeMonitor",
                daemon=True,
            ).start()

    def start(self) -> None:
        """Start or find a node without a known address; a lost one gets its budget."""
        with self._lock:
            self._end_killed()
            if not isinstance(self.source, str) and self._process is None:
                self._process = self.source(self._total_gib)
                self.address = self._process.address
                self._auth_token = self._process.auth_token

    def refresh_info(self) -> NodeInfo:
        """Ask for the free memory."""
        return self._channel().refresh_info()

    def reserve(self, requests: Iterable[ReserveCapacity]) -> None:
        """Reserve memory for each rank until ``close``, or until the node is lost."""
        self._shares = [RankShare(request) for request in requests]
        self._reserve()

    def limit_blocks(self, num_blocks: Iterable[int]) -> None:
        """Give back memory that no block of the pool needs.

        A partition by heads is limited by the smallest node, and a user may limit the
        pool.

        Args:
            num_blocks: Blocks of each rank's session.
        """
        held_bytes = self.kv_bytes
        for share, count in zip(self._shares, num_blocks, strict=True):
            share.limit(count)
        if self.kv_bytes != held_bytes:
            self.renew()

    def renew(self) -> None:
        """Give back everything and reserve the same again; data channels end."""
        # Not the list itself, which a loss empties at any time.
        held, self._reservations = self._reservations, []
        for reservation in held:
            self._channel().close_session(reservation)
        self._reserve()

    def rejoin(
        self, timeout_s: float, on_loss: Callable[[MemoryNodeError], None] | None
    ) -> None:
        """Start or connect to a lost node again and reserve the same memory.

        Args:
            timeout_s: Deadline for the connection.
            on_loss: As in ``watch``; None: nobody watches.

        Raises:
            MemoryNodeError: It is not back, or holds less than before. After this or
                any other exception it stays lost, and nothing of it is left.
        """
        try:
            self.join(timeout_s)
            self._reserve()
            self._check_size()
            if on_loss is not None:
                self.watch(on_loss)
        except BaseException:
            self.lose()
            raise

    def take_over(self, lost: NodeHandle) -> None:
        """Take the place of a lost node with the next ``rejoin``."""
        self._shares = [dataclasses.replace(share) for share in lost._shares]

    def open_sessions(self, generation: int, limits: SessionLimits) -> list[Attachment]:
        """Turn all reservations into KV pools.

        Returns:
            One attachment per rank.
        """
        return [self._open(share, generation, limits) for share in self._shares]

    def watch(self, on_loss: Callable[[MemoryNodeError], None]) -> None:
        """Report the loss of a connection, once, from a thread.

        Args:
            on_loss: Called with the reason, after the node was marked as lost.
        """
        self._on_loss = on_loss
        self._channel()  # Raises if it was lost before.

    def check(self) -> None:
        """Mark the node as lost if it does not answer."""
        control = self._control
        if control is not None:
            try:
                control.ping(self._timeout_s)
            except MemoryNodeError:
                self.lose(control)

    def lose(self, control: ControlClient | None = None) -> bool:
        """Close the connection and kill a node of ours, which may only be hanging.

        Args:
            control: Do nothing unless this connection is still in use.

        Returns:
            False if nothing was done.
        """
        with self._lock:
            if control is not None and control is not self._control:
                return False
            self.is_lost = True
            self._reservations.clear()
            if self._control is not None:
                self._control.close()
                self._control = None
            self._killed, self._process = self._process or self._killed, None
            # A process that the kernel has not ended yet does not hide the loss.
            with contextlib.suppress(MemoryNodeError):
                self._end_killed()
            return True

    def request_stop(self) -> None:
        """Ask a node of ours to end, without waiting; its loss is not reported."""
        self._is_leaving = True
        if self._process is not None:
            self._process.request_stop()

    def close(self) -> None:
        """Leave the node and end it if it is ours. Safe to call twice."""
        control, self._control = self._control, None
        if control is not None:
            control.close()
        if self._process is not None:
            with contextlib.suppress(MemoryNodeError):  # it was killed
                self._process.stop()

    def _end_killed(self) -> None:
        """End a lost process before another one takes its memory and its address."""
        if self._killed is not None:
            self._killed.kill()
            self._killed = None

    def _reserve(self) -> None:
        for share in self._shares:
            reserved = self._channel().reserve(share.request)
            self._reservations.append(reserved.reservation)
            share.reservation = reserved.reservation
            share.num_reserved = reserved.num_blocks
            share.ask(reserved.kv_bytes)

    def _check_size(self) -> None:
        if any(share.num_reserved < share.num_opened for share in self._shares):
            raise MemoryNodeError(
                self.address,
                f"its kernel ({self.info.attention_kernel}) fits "
                f"{min(self.num_blocks):,} blocks where "
                f"{max(share.num_opened for share in self._shares):,} were held "
                "before. Use a standby with the same device and kernel.",
            )

    def _open(
        self, share: RankShare, generation: int, limits: SessionLimits
    ) -> Attachment:
        opened = self._channel().open_session(
            OpenSession(
                reservation=share.reservation,
                generation=generation,
                num_blocks=share.num_opened,
                max_num_tokens=limits.max_num_tokens,
                max_num_reqs=limits.max_num_reqs,
                max_blocks_per_req=limits.max_blocks_per_req,
            )
        )
        names = self.address, opened.session, opened.attach_token
        # Calls to workers are not encrypted.
        token = self._credentials.besides_file(self._auth_token)
        return Attachment(*names, generation, share.num_opened, token)

    def _channel(self) -> ControlClient:
        if (control := self._control) is None:
            raise MemoryNodeError(self.address, self._cause)
        return control

    def _monitor(self, control: ControlClient) -> None:
        """Send heartbeats, so that the node keeps the connection while models load."""
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
            self._cause = f"it was lost: {cause}"
            if self._on_loss is not None:
                self._on_loss(MemoryNodeError(self.address, self._cause))
