# SPDX-License-Identifier: Apache-2.0
"""Tells systemd how the node does."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 1.0


class ServiceManager:
    """Speaks the protocol of sd_notify(3), where a service manager started us.

    Args:
        environment: Of this process; its NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID
            are used.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        self._watchdog_s = 0.0
        usec = environment.get("WATCHDOG_USEC", "")
        if usec.isdecimal() and environment.get("WATCHDOG_PID", str(os.getpid())) == (
            str(os.getpid())
        ):
            self._watchdog_s = int(usec) / 1e6

    def notify(self, **fields: str) -> None:
        """Send fields such as ``READY="1"``; a manager that is gone is ignored."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_TIMEOUT_S)
                sock.sendto(text.encode(), self._address)
        except OSError as error:
            logger.warning("the service manager was not told %s: %s", text, error)

    def watch(self, is_alive: Callable[[], bool], stop: threading.Event) -> None:
        """Feed the watchdog, where there is one, in the background.

        Args:
            is_alive: Asked before every message, which is not sent once it says no.
            stop: Ends it.
        """
        if not (self._address and self._watchdog_s):
            return

        def feed() -> None:
            while not stop.is_set() and is_alive():
                self.notify(WATCHDOG="1")
                stop.wait(self._watchdog_s / 2)

        threading.Thread(target=feed, name="watchdog", daemon=True).start()
