# SPDX-License-Identifier: Apache-2.0
"""The memory node's side of ``benchmarks/transport.py``: answers, but computes nothing.

``python benchmarks/harness/transport_node.py FD CPU``.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
import tracemalloc

from vllm_attn_offload.memory_node.node_channel import open_node_channel
from vllm_attn_offload.protocol.frames import FrameHeader, FrameKind
from vllm_attn_offload.protocol.messages import AttachSession
from vllm_attn_offload.transport.control import message_decoder, receive_message

#: CPU seconds of the process so far, and bytes that tracemalloc sees.
USAGE = struct.Struct("<dq")
#: Flags of a STEP frame, which asks for the above.
TRACE, STOP_TRACING = 1, 2
MAX_BYTES = 8 << 20
TIMEOUT_S = 30.0


def reply_bytes(num_bytes: int) -> int:
    """Size of the reply: with grouped queries less comes back than goes."""
    return num_bytes * 7 // 10


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    os.sched_setaffinity(0, {int(sys.argv[2])})
    decoder = message_decoder(AttachSession)
    request = receive_message(sock, decoder, max_bytes=1 << 16, timeout_s=TIMEOUT_S)
    channel = open_node_channel(
        sock,
        request.offer,
        request_bytes=MAX_BYTES,
        reply_bytes=MAX_BYTES,
        timeout_s=TIMEOUT_S,
    )
    header, expected = FrameHeader(), 0
    while True:
        try:
            channel.receive_header(header, None)
        except ConnectionError:
            return
        channel.receive_payload(header.num_bytes)
        if header.step != expected:
            raise RuntimeError(f"frame {header.step} came in place of {expected}")
        expected += 1
        if header.kind == FrameKind.STEP:
            if header.flags == TRACE:
                tracemalloc.start()
            elif header.flags == STOP_TRACING:
                tracemalloc.stop()
            traced, _ = tracemalloc.get_traced_memory()
            reply = channel.payload_buffer(USAGE.size)
            USAGE.pack_into(reply, 0, time.process_time(), traced)
        else:
            reply = channel.payload_buffer(reply_bytes(header.num_bytes))
        header.num_bytes = reply.nbytes
        channel.send(header, reply)


if __name__ == "__main__":
    main()
