# SPDX-License-Identifier: Apache-2.0
"""What a node answers, and what it means where it is not the output."""

from __future__ import annotations

from vllm_attn_offload.errors import (
    MemoryNodeError,
    NodeDefectError,
    NodeFailedError,
    ProtocolError,
)
from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind
from vllm_attn_offload.transport.base import Transport

_MAX_ERROR_BYTES = 1 << 16
#: Answers to one micro-batch, which may stand before an error, and their size.
_MAX_UNREAD_REPLIES = 4
_MAX_UNREAD_BYTES = 16 << 20
_UNREAD_TIMEOUT_S = 0.5


class NodeReplies:
    """Reads replies of a node's data channel.

    Args:
        address: The node, as the user wrote it.
        transport: Its channel.

    Attributes:
        header: Of the reply that came last.
    """

    def __init__(self, address: str, transport: Transport) -> None:
        self._address = address
        self._transport = transport
        self.header = FrameHeader()

    def receive_out(self, layer: int, num_bytes: int, timeout_s: float) -> None:
        """Wait for the header of a layer's output.

        Raises:
            NodeDefectError: The node refused the layer.
            NodeFailedError: It could not compute.
            OSError: It is gone or too slow.
            ProtocolError: It answered with something else.
        """
        self._transport.receive_header(self.header, timeout_s)
        self.check_out(layer, num_bytes)

    def check_out(self, layer: int, num_bytes: int) -> None:
        """Raise, as `receive_out`, unless the last header is that of an output."""
        header = self.header
        if header.kind == FrameKind.ERROR:
            raise self._refusal()
        if header.kind != FrameKind.OUT or header.layer != layer:
            raise ProtocolError(f"a frame of kind {header.kind} was not expected")
        if header.num_bytes != num_bytes:
            raise ProtocolError(
                f"{header.num_bytes:,} bytes of output; {num_bytes:,} expected"
            )

    def not_sent(self, error: Exception) -> MemoryNodeError:
        """What the node said before it stopped taking frames, if it said anything."""
        header, transport = self.header, self._transport
        try:
            for _ in range(_MAX_UNREAD_REPLIES):
                transport.receive_header(header, _UNREAD_TIMEOUT_S)
                if header.kind == FrameKind.ERROR:
                    return self._refusal()
                if header.num_bytes > _MAX_UNREAD_BYTES:
                    break
                if not header.flags & FrameFlag.ON_DEVICE.value:
                    transport.receive_payload(header.num_bytes)
        except (OSError, ProtocolError):
            pass
        return lost_session(self._address, error)

    def _refusal(self) -> MemoryNodeError:
        is_failure = self.header.flags & FrameFlag.FAILED.value
        kind = NodeFailedError if is_failure else NodeDefectError
        return kind(self._address, self._read_error())

    def _read_error(self) -> str:
        num_bytes = self.header.num_bytes
        if num_bytes > _MAX_ERROR_BYTES:
            raise ProtocolError(f"an error message of {num_bytes:,} bytes")
        payload = self._transport.receive_payload(num_bytes)
        return bytes(payload).decode(errors="replace")


def lost_session(address: str, error: Exception) -> MemoryNodeError:
    """The loss of a channel, in users' words."""
    kind = NodeDefectError if isinstance(error, ProtocolError) else MemoryNodeError
    return kind(
        address,
        f"its session was lost ({error}). See the log of 'vllm-memory-node' there.",
    )
