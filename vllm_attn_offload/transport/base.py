# SPDX-License-Identifier: Apache-2.0
"""The interface of a data channel: frames between one worker and one memory node."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vllm_attn_offload.protocol.frames import FrameHeader


class Transport(ABC):
    """Ordered frames in both directions, each a header and a payload.

    One thread sends and one thread receives at a time; they may be different threads.
    Buffers belong to the transport or to the caller and are reused; nothing is
    allocated per frame once sizes are known.

    Attributes:
        name: Carrier of the frames, as shown to users.
    """

    name: str

    @abstractmethod
    def payload_buffer(self, num_bytes: int) -> memoryview:
        """Lend memory for the next frame's payload, to be filled and passed to `send`.

        Returns:
            ``num_bytes`` writable bytes, valid until that `send`. Asked again before
            it, the content is lost. The same object comes back for the same memory and
            size, so what was wrapped around it once may be kept.

        Raises:
            OSError: The peer is gone, or took nothing for the transport's deadline.
            ValueError: More bytes than a frame of this channel may have.
        """

    @abstractmethod
    def send(self, header: FrameHeader, *payload: memoryview) -> None:
        """Send a frame; the buffers may be reused when this returns.

        Args:
            header: ``num_bytes`` must equal the sum of the payload's bytes.
            payload: Contiguous bytes ``[n]`` that are sent one after another. What
                `payload_buffer` returned is not copied where memory is shared.

        Raises:
            OSError: The peer is gone, or took nothing for the transport's deadline.
            ValueError: More bytes than a frame of this channel may have.
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
            TimeoutError: No frame came in time, or only a part of its header.
            ProtocolError: What came is not a frame.
        """

    @abstractmethod
    def receive_payload(self, num_bytes: int) -> memoryview:
        """Read the payload of the current frame.

        Where memory is shared the peer can still write to the view: copy what must not
        change between a check and its use (`receive_payload_into`).

        Returns:
            ``num_bytes`` bytes in the transport's own memory, valid until the next
            frame is received. The caller has checked ``num_bytes``. The same object
            comes back for the same memory and size.

        Raises:
            OSError: The peer is gone, stopped in the middle of the payload, or sends it
                too slowly.
        """

    @abstractmethod
    def receive_payload_into(self, target: memoryview) -> None:
        """Read the payload of the current frame into all of ``target`` ``[num_bytes]``.

        Raises:
            OSError: The peer is gone, stopped in the middle of the payload, or sends it
                too slowly.
        """

    @abstractmethod
    def has_ended(self) -> bool:
        """Return True if either side has closed the channel; reads nothing."""

    @abstractmethod
    def linger(self) -> None:
        """Let the peer read what was sent last, before `close`.

        Nothing else is received: what the peer was sending is dropped, for some seconds
        at most.
        """

    @abstractmethod
    def close(self) -> None:
        """End the channel; wakes threads that wait in it. Safe to call twice."""
