# SPDX-License-Identifier: Apache-2.0
"""One side of a shared-memory channel in a process of its own, to be killed.

``python peer_process.py FD WHAT``: FD is a Unix socket, WHAT one of
``node-echo`` (answers every frame), ``node-stuck`` (never receives), ``worker-silent``
(waits for a reply that never comes) and ``worker-flood`` (sends without end).
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

from channel_pairs import receive_attached

from vllm_attn_offload.memory_node.node_channel import open_node_channel
from vllm_attn_offload.protocol.frames import FrameHeader
from vllm_attn_offload.protocol.messages import ChannelOffer
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.negotiate import open_worker_channel

SLOT_BYTES = 1 << 20
OFFER = ChannelOffer(list(range(64)), 1, True)


def open_channel(sock: socket.socket, is_node: bool) -> Transport:
    """Attach as one of the two sides."""
    if is_node:
        return open_node_channel(
            sock,
            OFFER,
            request_bytes=SLOT_BYTES,
            reply_bytes=SLOT_BYTES,
            timeout_s=60,
        )
    return open_worker_channel(sock, receive_attached(sock), timeout_s=60)


def main() -> None:
    sock, what = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    channel = open_channel(sock, what.startswith("node"))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    header = FrameHeader()
    payload = memoryview(bytes(SLOT_BYTES))
    with contextlib.suppress(OSError):
        while what == "node-echo":
            channel.receive_header(header, None)
            channel.send(header, channel.receive_payload(header.num_bytes))
        while what == "worker-silent":
            channel.receive_header(header, None)
        while what == "worker-flood":
            channel.send(FrameHeader(num_bytes=SLOT_BYTES), payload)
        time.sleep(60)


if __name__ == "__main__":
    main()
