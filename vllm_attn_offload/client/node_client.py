# SPDX-License-Identifier: Apache-2.0
"""A worker's data channel to one memory node: a STEP per step, a LAYER per layer."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from vllm_attn_offload.client.handshake import call
from vllm_attn_offload.client.layer_call import LayerCall
from vllm_attn_offload.client.neighbour import connect_nearest
from vllm_attn_offload.client.node_replies import NodeReplies, lost_session
from vllm_attn_offload.errors import MemoryNodeError, ProtocolError
from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind
from vllm_attn_offload.protocol.messages import Attached, AttachSession
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.cuda_memory import SharedDevice
from vllm_attn_offload.transport.device_memory import DeviceMemoryTransport
from vllm_attn_offload.transport.negotiate import offer_channel, open_worker_channel
from vllm_attn_offload.transport.shared_memory import SharedMemoryTransport
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

_ROWS_ON_DEVICE = FrameFlag.ON_DEVICE.value | FrameFlag.FUSED.value
#: Keys and values that a node may be behind with before its answer is waited for.
MAX_UNACKNOWLEDGED_BYTES = 64 << 20


class NodeClient:
    """Sends a layer's q, k, v to the node and receives the attention output.

    Args:
        address: The node, as the user wrote it.
        attach: Names the session; its token is used up.
        timeout_s: Deadline for every answer of the node.
        credentials: What to show the node, and to ask of it.
        device: What the worker computes on, where memory of others can be mapped there.

    Raises:
        MemoryNodeError: The node is gone or refuses the session.
    """

    def __init__(
        self,
        address: str,
        attach: AttachSession,
        timeout_s: float,
        credentials: Credentials = NO_CREDENTIALS,
        device: SharedDevice | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._header = FrameHeader()
        self._unacknowledged = 0
        sock = connect_nearest(address, timeout_s, credentials)
        try:
            offer = offer_channel(sock, torch.get_num_threads(), device)
            attach = msgspec.structs.replace(attach, offer=offer)
            attached = call(sock, address, attach, Attached, timeout_s)
            self._transport: Transport = open_worker_channel(
                sock, attached, timeout_s=timeout_s, device=device
            )
        except (OSError, ProtocolError) as error:
            sock.close()
            raise lost_session(address, error) from error
        except MemoryNodeError:
            sock.close()
            raise
        self._replies = NodeReplies(address, self._transport)

    def layer_call(self) -> LayerCall | None:
        """Return what `exchange` takes; None where the library is not on both sides."""
        transport = self._transport
        # Rows in device memory go another way, those of its prefills in two calls.
        if type(transport) is not SharedMemoryTransport:
            return None
        return LayerCall(transport, self._timeout_s)

    @property
    def transport_name(self) -> str:
        """Name of the transport, as shown to users."""
        return self._transport.name

    def post_step(
        self,
        step: int,
        micro_batch: int,
        group: int,
        payload: memoryview,
        flags: int = 0,
    ) -> None:
        """Send a step's metadata for one KV group; the node does not answer it.

        Args:
            step: Number of the step; layers refer to it.
            micro_batch: Index of the micro-batch.
            group: Index of the KV cache group.
            payload: Bytes ``[num_bytes]`` that ``write_step`` wrote.
            flags: ``FrameFlag``.

        Raises:
            MemoryNodeError: The node is gone.
        """
        header = self._header
        header.kind, header.step, header.group = FrameKind.STEP, step, group
        header.micro_batch = micro_batch
        header.layer, header.flags = 0, flags
        header.num_bytes = payload.nbytes
        self._send(payload)

    def payload_buffer(self, num_bytes: int) -> memoryview:
        """Writable memory for the next LAYER's payload, valid until it is posted.

        Raises:
            MemoryNodeError: The node is gone.
        """
        try:
            return self._transport.payload_buffer(num_bytes)
        except (OSError, ValueError) as error:
            raise self._replies.not_sent(error) from error

    def post_layer(
        self,
        step: int,
        micro_batch: int,
        layer: int,
        flags: int,
        payload: memoryview,
        *,
        has_queries: bool,
    ) -> bool:
        """Send q, k, v of one layer.

        Args:
            step: Number of the STEP frame that describes the rows.
            micro_batch: The STEP's micro-batch.
            layer: Index of the layer in the session's geometry.
            flags: ``FrameFlag``.
            payload: Bytes ``[num_bytes]``: rows of q, k and v, as ``flags`` says.
            has_queries: Whether the node attends. What it only stores it acknowledges
                now and then, so that a bounded amount is under way.

        Returns:
            Whether ``receive_out`` must follow. Replies come in the order of layers.
        """
        num_bytes = payload.nbytes
        has_reply = has_queries
        if has_queries:
            self._unacknowledged = 0
        else:
            self._unacknowledged += num_bytes
            if self._unacknowledged > MAX_UNACKNOWLEDGED_BYTES:
                self._unacknowledged = 0
                flags |= FrameFlag.WANT_ACK.value
                has_reply = True
        header = self._header
        header.kind, header.step, header.layer = FrameKind.LAYER, step, layer
        header.micro_batch, header.flags, header.group = micro_batch, flags, 0
        header.num_bytes = num_bytes
        self._send(payload)
        return has_reply

    def receive_out(
        self, layer: int, out: memoryview, allowance_s: float = 0.0
    ) -> None:
        """Wait for the attention output of a layer and read it into ``out``.

        Args:
            layer: Index of the posted layer.
            out: Bytes ``[num_bytes]``, filled; empty for an acknowledgement.
            allowance_s: Time that the work itself may take, beyond the deadline of an
                answer: a slow node is not a lost one.

        Raises:
            MemoryNodeError: The node is gone or too slow.
            NodeDefectError: It refused the layer, or answered with something else.
            NodeFailedError: It could not compute.
        """
        try:
            self._replies.receive_out(layer, out.nbytes, self._timeout_s + allowance_s)
            self._transport.receive_payload_into(out)
        except (OSError, ProtocolError) as error:
            raise lost_session(self.address, error) from error

    def exchange(self, call: LayerCall, layer: int, allowance_s: float) -> None:
        """Send all rows of a layer and receive its output, in one call.

        Args:
            call: Result of `layer_call`, which names the rows.
            layer: Index of the layer in the session's geometry.
            allowance_s: As for `receive_out`.

        Raises:
            MemoryNodeError: As `receive_out`, or nothing could be sent.
        """
        self._unacknowledged = 0
        replies = self._replies
        try:
            if not call.run(layer, self._timeout_s + allowance_s, replies.header):
                replies.check_out(layer, call.out_bytes)
                raise ProtocolError("output that is not in host memory")
        except (OSError, ProtocolError, ValueError) as error:
            if not call.is_sent:
                raise replies.not_sent(error) from error
            raise lost_session(self.address, error) from error

    def rows_buffer(self, num_bytes: int) -> torch.Tensor | None:
        """Device memory for the next LAYER's rows, to be complete when posted.

        Returns:
            uint8 ``[num_bytes]``; None where the rows must pass through the host.

        Raises:
            MemoryNodeError: The node is gone.
        """
        transport = self._transport
        if not isinstance(transport, DeviceMemoryTransport):
            return None
        try:
            return (
                transport.rows_buffer(num_bytes) if transport.fits(num_bytes) else None
            )
        except OSError as error:
            raise self._replies.not_sent(error) from error

    def post_rows(
        self, step: int, micro_batch: int, layer: int, num_bytes: int
    ) -> None:
        """Send the layer whose rows ``q | k | v`` are in the `rows_buffer`.

        Raises:
            MemoryNodeError: The node is gone.
        """
        self._unacknowledged = 0
        header = self._header
        header.kind, header.step, header.layer = FrameKind.LAYER, step, layer
        header.micro_batch, header.group = micro_batch, 0
        header.flags, header.num_bytes = _ROWS_ON_DEVICE, num_bytes
        self._send()

    def receive_rows(
        self, layer: int, num_bytes: int, allowance_s: float = 0.0
    ) -> torch.Tensor:
        """Wait for the output of a layer that `post_rows` sent.

        Returns:
            uint8 ``[num_bytes]`` of device memory, valid until anything is received;
            `keep_rows` puts that off.

        Raises:
            MemoryNodeError: As `receive_out`.
        """
        transport = self._transport
        assert isinstance(transport, DeviceMemoryTransport)
        try:
            self._replies.receive_out(layer, num_bytes, self._timeout_s + allowance_s)
            if not self._replies.header.flags & FrameFlag.ON_DEVICE.value:
                raise ProtocolError("output that is not in device memory")
            return transport.receive_rows(num_bytes)
        except (OSError, ProtocolError) as error:
            raise lost_session(self.address, error) from error

    def keep_rows(self, until: Callable[[], None]) -> None:
        """Call ``until``, which waits for the device, before received rows are lost."""
        assert isinstance(self._transport, DeviceMemoryTransport)
        self._transport.keep_rows(until)

    def close(self) -> None:
        """End the data channel."""
        self._transport.close()

    def _send(self, *payload: memoryview) -> None:
        try:
            self._transport.send(self._header, *payload)
        except OSError as error:
            raise self._replies.not_sent(error) from error
