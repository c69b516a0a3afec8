# SPDX-License-Identifier: Apache-2.0
"""A memory node: answers the requests of its peers."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.capacity import CapacityError
from vllm_attn_offload.memory_node.connections import (
    Connection,
    Connections,
    strangers,
)
from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.handshake import Handshake, RefusedError
from vllm_attn_offload.memory_node.listener import Listener
from vllm_attn_offload.memory_node.node_channel import NUM_SLOTS, open_node_channel
from vllm_attn_offload.memory_node.node_identity import (
    NodeIdentity,
    default_name,
    unix_path,
)
from vllm_attn_offload.memory_node.node_state import NodeState
from vllm_attn_offload.memory_node.page_faults import PageFaults
from vllm_attn_offload.memory_node.refusals import Refusals
from vllm_attn_offload.memory_node.reservations import Reservations
from vllm_attn_offload.protocol.messages import (
    MAX_CONTROL_BYTES,
    AttachSession,
    ChannelOffer,
    Closed,
    CloseSession,
    Error,
    GetStats,
    NodeInfo,
    OpenSession,
    Ping,
    Pong,
    Reply,
    Request,
    ReserveCapacity,
    SessionOpened,
    Stats,
)
from vllm_attn_offload.protocol.reasons import RefusedReason
from vllm_attn_offload.transport.address import (
    Address,
    check_peer,
    set_tcp_options,
)
from vllm_attn_offload.transport.control import (
    HANDSHAKE_TIMEOUT_S,
    message_decoder,
    receive_message,
    send_message,
)
from vllm_attn_offload.transport.negotiate import is_same_host
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

logger = logging.getLogger(__name__)

_MESSAGE_TIMEOUT_S = 10.0
_STALL_TIMEOUT_S = 30.0

_request_decoder = message_decoder(Request)


class MemoryNode:
    """Serves KV pools and attention to any number of engines.

    Args:
        addresses: Where to listen; the first is the one that users are told.
        attention: The kernel that attends.
        device: What the node runs on, as shown to users.
        kv_bytes: Budget for KV blocks of all engines.
        credentials: What peers must show, and what they are shown.
        name: Label of its metrics; "": its host and port.

    Attributes:
        address: The first of its addresses, with the port that was bound.
        addresses: All of them.
        state: What the node does.

    Raises:
        OSError: An address cannot be bound; it is the error's ``filename``.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        attention: DecodeAttention[Any, Any],
        device: str,
        kv_bytes: int,
        credentials: Credentials = NO_CREDENTIALS,
        name: str = "",
    ) -> None:
        self.state = NodeState.STARTING
        self._attention = attention
        self._credentials = credentials
        self._refusals = Refusals()
        self._reservations = Reservations(attention, kv_bytes, self._refusals)
        self._faults = PageFaults()
        self._started = time.monotonic()
        self._connections = Connections()
        self._listener = Listener(
            addresses,
            self._connections,
            self._serve_connection,
            lambda: self._refusals.count("connections"),
        )
        self.addresses = self._listener.addresses
        self.address = self.addresses[0]
        self._identity = NodeIdentity(
            name or default_name(self.addresses),
            device,
            attention.name,
            attention.isa,
            unix_path(self.addresses),
        )

    @property
    def max_frame_bytes(self) -> int:
        """Budget for frames and plans of all engines, beside that for KV blocks."""
        return self._reservations.frames.total_bytes

    @property
    def name(self) -> str:
        """Label of its metrics."""
        return self._identity.name

    @property
    def is_accepting(self) -> bool:
        """True while it waits for peers at every address."""
        return self._listener.is_accepting

    def start(self) -> None:
        """Accept connections in the background."""
        self._faults = PageFaults()
        self._started = time.monotonic()
        self._listener.start()
        self.state = NodeState.SERVING

    def stop(self) -> None:
        """Stop listening, end every connection and free every pool."""
        self.state = NodeState.STOPPING
        self._listener.stop()
        self._reservations.release_all()

    def info(self) -> NodeInfo:
        """Description of the node, and how much of it is free."""
        ledger = self._reservations.ledger
        return self._identity.info(ledger.total_bytes, ledger.free_bytes)

    def stats(self) -> Stats:
        """Counters of the node's sessions."""
        return Stats(
            node=self.info(),
            cpu_ids=sorted(os.sched_getaffinity(0)),
            sessions=self._reservations.stats(),
            num_minor_faults=self._faults.minor,
            num_major_faults=self._faults.major,
            uptime_s=time.monotonic() - self._started,
            num_connections=len(self._connections),
            refused=self._refusals.refused,
            invalid_frames=self._refusals.invalid_frames,
            frame_bytes_total=self._reservations.frames.total_bytes,
            frame_bytes_free=self._reservations.frames.free_bytes,
            certificate_expires=self._credentials.expiry(),
        )

    def _serve_connection(self, connection: Connection) -> None:
        try:
            check_peer(connection.sock)
            set_tcp_options(connection.sock)
            handshake = Handshake(self._credentials, HANDSHAKE_TIMEOUT_S)
            connection.sock = handshake.wrap(connection.sock)
            handshake.shake(connection.sock, self.info)
            connection.is_admitted = True
            self._serve_requests(connection)
        except ProtocolError as error:
            self._refusals.count("request")
            connection.log.warning(
                "closed a connection of %s: it sent %s", connection.peer, error
            )
        except (RefusedError, OSError) as error:
            reason = None if connection.is_admitted else _refused_reason(error)
            if reason is None:
                logger.debug("a connection of %s ended: %s", connection.peer, error)
                return
            self._refusals.count(reason)
            strangers.warning("refused a connection of %s: %s", connection.peer, error)
        finally:
            for reservation in connection.reservations:
                self._reservations.release(reservation)

    def _serve_requests(self, connection: Connection) -> None:
        sock = connection.sock
        while True:
            request = receive_message(
                sock,
                _request_decoder,
                max_bytes=MAX_CONTROL_BYTES,
                timeout_s=_MESSAGE_TIMEOUT_S,
                idle_s=None,
            )
            connection.note_request()
            if isinstance(request, AttachSession):
                connection.is_data_channel = True
                self._serve_data_channel(sock, request)
                return
            send_message(sock, self._answer(request, connection), _MESSAGE_TIMEOUT_S)

    def _answer(self, request: Request, connection: Connection) -> Reply:
        try:
            match request:
                case ReserveCapacity():
                    reserved = self._reservations.reserve(request, connection.engine_id)
                    connection.reservations.append(reserved.reservation)
                    return reserved
                case OpenSession():
                    return self._open(request, connection)
                case CloseSession():
                    return self._close(request, connection)
                case GetStats():
                    return self.stats()
                case Ping():
                    return Pong()
                case _:
                    raise ValueError(f"{type(request).__name__} is not allowed here")
        except (CapacityError, ValueError) as error:
            is_full = isinstance(error, CapacityError)
            self._refusals.count("capacity" if is_full else "request")
            connection.log.warning("refused %s: %s", type(request).__name__, error)
            return Error(str(error))

    def _open(self, request: OpenSession, connection: Connection) -> SessionOpened:
        if request.reservation not in connection.reservations:
            raise ValueError("this connection has no such unopened reservation")
        return self._reservations.open(request)

    def _close(self, request: CloseSession, connection: Connection) -> Closed:
        if request.reservation not in connection.reservations:
            raise ValueError("this connection has no such reservation")
        connection.reservations.remove(request.reservation)
        self._reservations.release(request.reservation)
        return Closed()

    def _serve_data_channel(self, sock: socket.socket, request: AttachSession) -> None:
        try:
            session = self._reservations.attach(request)
        except ValueError as error:
            self._refusals.count("request")
            strangers.warning("refused a data channel: %s", error)
            send_message(sock, Error(str(error)), _MESSAGE_TIMEOUT_S)
            return
        if request.offer is not None and is_same_host(sock):
            session.worker_cpu_ids = request.offer.cpu_ids
        request_bytes, reply_bytes = session.sizes.longest()
        transport = open_node_channel(
            sock,
            self._affordable(request),
            request_bytes=request_bytes,
            reply_bytes=reply_bytes,
            timeout_s=_STALL_TIMEOUT_S,
            device_rows=session.device_rows(),
        )
        try:
            session.serve(transport)
        finally:
            transport.close()

    def _affordable(self, request: AttachSession) -> ChannelOffer | None:
        """The worker's offer, without shared memory that is not to be had."""
        offer = request.offer
        if offer is None or not offer.shared_memory:
            return offer
        if self._reservations.hold_slots(request.session, NUM_SLOTS):
            return offer
        return msgspec.structs.replace(offer, shared_memory=False)


def _refused_reason(error: RefusedError | OSError) -> RefusedReason | None:
    """Tell why a peer was refused; None where it went away, as probes of a port do."""
    match error:
        case RefusedError():
            return error.reason
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return None
        case ssl.SSLError():
            return "tls"
    return "peer" if isinstance(error, PermissionError) else None
