# SPDX-License-Identifier: Apache-2.0
"""Tells a worker why its data channel ends."""

from __future__ import annotations

import logging

from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind
from vllm_attn_offload.transport.base import Transport

logger = logging.getLogger(__name__)


def send_error(
    transport: Transport, message: str, flags: FrameFlag = FrameFlag.NONE
) -> None:
    """Send an ERROR frame, and give a worker that is still sending time to read it."""
    payload = memoryview(message.encode())
    header = FrameHeader(
        kind=FrameKind.ERROR, flags=flags.value, num_bytes=payload.nbytes
    )
    try:
        transport.send(header, payload)
        transport.linger()
    except OSError as error:
        logger.debug("the refusal was not delivered: %s", error)
