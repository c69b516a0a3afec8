# SPDX-License-Identifier: Apache-2.0
"""A worker's data channel to one memory node: a STEP per step, a LAYER per layer."""

from __future__ import annotations

from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.errors import MemoryNodeError, ProtocolError
from vllm_attn_offload.protocol import (
    Attached,
    AttachSession,
    FrameHeader,
    FrameKind,
)
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.tcp import TcpTransport

_MAX_ERROR_BYTES = 1 << 16


class NodeClient:
    """Sends a layer's q, k, v to the node and receives the attention output.

    Args:
        address: The node, as the user wrote it.
        attach: Names the session; its token is used up.
        timeout_s: Deadline for every answer of the node.

    Raises:
        MemoryNodeError: The node is gone or refuses the session.
    """

    def __init__(self, address: str, attach: AttachSession, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._header = FrameHeader()
        sock, _ = connect(address, timeout_s)
        try:
            call(sock, address, attach, Attached, timeout_s)
        except MemoryNodeError:
            sock.close()
            raise
        self._transport: Transport = TcpTransport(sock, stall_timeout_s=timeout_s)

    def post_step(self, step: int, group: int, payload: memoryview) -> None:
        """Send a step's metadata for one KV group; the node does not answer it."""
        header = self._header
        header.kind, header.step, header.group = FrameKind.STEP, step, group
        header.layer = header.micro_batch = header.flags = 0
        header.num_bytes = payload.nbytes
        self._send(payload)

    def post_layer(self, step: int, layer: int, qkv: memoryview) -> None:
        """Send q, k, v of one layer, ``[num_tokens, row width]`` bytes."""
        header = self._header
        header.kind, header.step, header.layer = FrameKind.LAYER, step, layer
        header.micro_batch = header.group = header.flags = 0
        header.num_bytes = qkv.nbytes
        self._send(qkv)

    def receive_out(self, layer: int, out: memoryview) -> None:
        """Wait for the attention output of a layer and read it into ``out``.

        Raises:
            MemoryNodeError: The node is gone, too slow, or refused the layer.
        """
        header = self._header
        try:
            self._transport.receive_header(header, self._timeout_s)
            if header.kind == FrameKind.ERROR:
                raise MemoryNodeError(self.address, self._read_error(header))
            if header.kind != FrameKind.OUT or header.layer != layer:
                raise ProtocolError(f"a frame of kind {header.kind} was not expected")
            if header.num_bytes != out.nbytes:
                raise ProtocolError(
                    f"{header.num_bytes:,} bytes of output; {out.nbytes:,} expected"
                )
            self._transport.receive_payload_into(out)
        except (OSError, ProtocolError) as error:
            raise self._lost(error) from error

    def close(self) -> None:
        """End the data channel."""
        self._transport.close()

    def _send(self, payload: memoryview) -> None:
        try:
            self._transport.send(self._header, payload)
        except OSError as error:
            raise self._lost(error) from error

    def _read_error(self, header: FrameHeader) -> str:
        if header.num_bytes > _MAX_ERROR_BYTES:
            raise ProtocolError(f"an error message of {header.num_bytes:,} bytes")
        payload = self._transport.receive_payload(header.num_bytes)
        return bytes(payload).decode(errors="replace")

    def _lost(self, error: Exception) -> MemoryNodeError:
        return MemoryNodeError(
            self.address,
            f"its session was lost ({error}). See the log of 'vllm-memory-node' there.",
        )
