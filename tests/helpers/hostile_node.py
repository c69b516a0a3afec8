# SPDX-License-Identifier: Apache-2.0
"""A node that speaks the protocol and says what no terminal should be sent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from vllm_attn_offload.protocol.messages import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    GetStats,
    Hello,
    NodeInfo,
    Pong,
    Request,
    Stats,
)
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)

#: Sets a terminal's title, clears it, and turns the text round; and markup of rich.
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e[bold red]x[/]"
_TIMEOUT_S = 30.0


def evil_stats() -> Stats:
    """Control characters in every text, and numbers without sense."""
    info = NodeInfo(
        device=EVIL,
        attention_kernel=EVIL,
        pid=1,
        kv_bytes_total=-1,
        kv_bytes_free=1 << 62,
        name="[bold red]shelf[/]",
        version=EVIL,
        isa=EVIL,
        instance="x",
        host_id=EVIL,
        unix_path=EVIL,
    )
    counters = SessionCounters(attend_s=float("nan"), queue_s=float("inf"))
    session = SessionStats(
        engine=EVIL,
        tp_rank=0,
        num_blocks=1 << 62,
        kv_bytes=-5,
        worker_kv_bytes=0,
        worker_state_bytes=0,
        worker_cpu_ids=[],
        counters=counters,
        model=EVIL * 50,
        engine_index=0,
        transport="tcp",
        generation=0,
    )
    return Stats(
        node=info,
        cpu_ids=[],
        sessions=[session],
        num_minor_faults=0,
        num_major_faults=0,
        uptime_s=float("inf"),
        num_connections=0,
        refused={"token": 3},
        invalid_frames={},
        frame_bytes_total=0,
        frame_bytes_free=0,
        certificate_expires=float("nan"),
    )


@contextmanager
def hostile_node() -> Iterator[str]:
    """Address of one that serves until the context ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _serve(listener: socket.socket) -> None:
    decoder = message_decoder(Hello | Request)
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with sock:
            try:
                while True:
                    request = receive_message(
                        sock,
                        decoder,
                        max_bytes=MAX_CONTROL_BYTES,
                        timeout_s=_TIMEOUT_S,
                    )
                    send_message(sock, _reply(request), _TIMEOUT_S)
            except OSError:
                continue


def _reply(request: msgspec.Struct) -> msgspec.Struct:
    if isinstance(request, Hello):
        assert request.protocol_version == PROTOCOL_VERSION
        return evil_stats().node
    return evil_stats() if isinstance(request, GetStats) else Pong()
