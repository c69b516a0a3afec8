# SPDX-License-Identifier: Apache-2.0
"""A longer way to a memory node: relays TCP and delays both directions.

``slow_link.py READY_FD HOST:PORT`` listens on a free port of 127.0.0.1, writes it to
the file descriptor, and reads the one-way delay in ms from lines of stdin. For hosts
whose kernel has no ``tc netem``; a relayed byte takes about 0.1 ms without any delay.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from queue import SimpleQueue

CHUNK_BYTES = 1 << 18
CONNECT_TIMEOUT_S = 10.0


class SlowLink:
    """Relays connections to one address.

    Args:
        target: Host and port that connections are passed to.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.delay_s = 0.0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def address(self) -> str:
        """Address to connect to instead of the target."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def serve(self) -> None:
        """Accept connections for ever."""
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target, CONNECT_TIMEOUT_S)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for source, sink in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._relay(source, sink)

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        """Two threads: bytes that wait do not keep later ones from being read."""
        waiting: SimpleQueue[tuple[float, bytes]] = SimpleQueue()

        def read() -> None:
            data = b"-"
            while data:
                try:
                    data = source.recv(CHUNK_BYTES)
                except OSError:
                    data = b""
                waiting.put((time.monotonic() + self.delay_s, data))

        def write() -> None:
            while True:
                due, data = waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)
                except OSError:
                    return

        for work in (read, write):
            threading.Thread(target=work, daemon=True).start()


def main() -> None:
    """Relay until stdin ends."""
    ready, target = int(sys.argv[1]), sys.argv[2]
    host, port = target.rsplit(":", 1)
    link = SlowLink((host, int(port)))
    threading.Thread(target=link.serve, daemon=True).start()
    with os.fdopen(ready, "w") as stream:
        stream.write(link.address)
    for line in sys.stdin:
        link.delay_s = float(line) / 1e3


if __name__ == "__main__":
    main()
