# SPDX-License-Identifier: Apache-2.0
"""The interface of a data channel: frames between one worker and one memory node."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vllm_attn_offload.protocol import FrameHeader


class Transport(ABC):
    """Ordered frames in both directions, each a header and a payload.

    One thread sends and receives at a time. Buffers belong to the transport or to the
    caller and are reused; nothing is allocated per frame once sizes are known.
    """

    @abstractmethod
    def send(self, header: FrameHeader, *payload: memoryview) -> None:
        """Send a frame; the buffers may be reused when this returns.

        Args:
            header: ``num_bytes`` must equal the sum of the payload's bytes.
            payload: Contiguous byte views that are sent one after another.

        Raises:
            OSError: The peer is gone, or took nothing for the transport's deadline.
        """

    @abstractmethod
    def receive_header(self, header: FrameHeader, timeout_s: float | None) -> None:
        """Wait for a frame and read its header.

        Args:
            header: Overwritten with the received header.
            timeout_s: Seconds to wait for the frame; None waits until the transport
                is closed.

        Raises:
            ConnectionError: The peer closed the channel.
            TimeoutError: No frame came in time.
            ProtocolError: What came is not a frame.
        """

    @abstractmethod
    def receive_payload(self, num_bytes: int) -> memoryview:
        """Read the payload of the current frame.

        Returns:
            ``num_bytes`` bytes in the transport's own memory, valid until the next
            frame is received. The caller has checked ``num_bytes``.

        Raises:
            OSError: The peer is gone, or stopped in the middle of the payload.
        """

    @abstractmethod
    def receive_payload_into(self, target: memoryview) -> None:
        """Read the payload of the current frame into ``target``, filling it.

        Raises:
            OSError: The peer is gone, or stopped in the middle of the payload.
        """

    @abstractmethod
    def close(self) -> None:
        """End the channel; wakes a thread that waits in it. Safe to call twice."""
