# SPDX-License-Identifier: Apache-2.0
"""Frames: the 32-byte header in front of every tensor payload, kinds and flags."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag


class FrameKind(IntEnum):
    """Content of a frame."""

    STEP = 1
    LAYER = 2
    OUT = 3
    ERROR = 4


class FrameFlag(IntFlag):
    """Options of a LAYER frame, one of an ERROR frame and one of a STEP frame.

    ``WANT_LSE`` asks for the log-sum-exp behind the output. ``FUSED`` says that the
    payload is one row ``q | k | v`` per token; otherwise it is all of q, then all of k,
    then all of v. ``WANT_ACK`` asks for an empty OUT where there is nothing to attend.
    ``ON_DEVICE`` says that the rows lie in the frame's slot of device memory, and asks
    for an OUT that does so, too. ``FAILED`` says that the node could not compute what
    the protocol allows. ``ON_HALF``, of a STEP: the worker, which has the same CPUs,
    computes on the first half of them while its layers are attended; the rest is the
    node's. It counts where memory is shared.
    """

    NONE = 0
    WANT_LSE = 1
    FUSED = 2
    WANT_ACK = 4
    ON_DEVICE = 8
    FAILED = 16
    ON_HALF = 32


FRAME_MAGIC = 0x4F415631
FRAME_HEADER = struct.Struct("<IHHQHHIQ")
FRAME_HEADER_BYTES = FRAME_HEADER.size
#: Requests, stored rows, block-table columns, query rows, tables of block indices; then
#: nanoseconds that the worker has packed, sent and waited.
STEP_PREFIX = struct.Struct("<IIIIIQQQ")


@dataclass(slots=True)
class FrameHeader:
    """The 32 bytes in front of every tensor payload, little-endian.

    Reused between frames, because one is read per layer.
    """

    kind: int = 0
    layer: int = 0
    step: int = 0
    micro_batch: int = 0
    group: int = 0
    flags: int = 0
    num_bytes: int = 0

    def pack_into(self, buffer: bytearray | memoryview) -> None:
        """Write the header to ``buffer[:32]``."""
        FRAME_HEADER.pack_into(
            buffer,
            0,
            FRAME_MAGIC,
            self.kind,
            self.layer,
            self.step,
            self.micro_batch,
            self.group,
            self.flags,
            self.num_bytes,
        )

    def unpack_from(self, buffer: bytes | bytearray | memoryview) -> bool:
        """Read the header from ``buffer[:32]``; False if it is not one."""
        (
            magic,
            self.kind,
            self.layer,
            self.step,
            self.micro_batch,
            self.group,
            self.flags,
            self.num_bytes,
        ) = FRAME_HEADER.unpack_from(buffer, 0)
        return magic == FRAME_MAGIC
