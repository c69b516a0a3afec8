# SPDX-License-Identifier: Apache-2.0
"""Shows that memory nodes are away, while they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.logger import get_logger

logger = get_logger(__name__)

_LOG_EVERY_S = 10.0


class Outage(msgspec.Struct, frozen=True):
    """An engine without its KV pool; times are ``time.monotonic``, one for all
    processes of a host.

    ``refuse_from_s``: new requests are refused from then on. ``is_final``: the engine
    gave up and stops.
    """

    node: str
    cause: str
    since_s: float
    refuse_from_s: float
    deadline_s: float
    is_final: bool = False

    def remaining_s(self) -> float:
        """Seconds until the engine stops."""
        return max(0.0, self.deadline_s - time.monotonic())


class OutageNotice:
    """Publishes the outage of an engine, and logs it every ten seconds.

    Args:
        publish: Called with the current outage; None: it is over.
        timeout_s: Time from a loss until the engine stops.
        grace_s: Time from a loss until new requests are refused.
    """

    def __init__(
        self,
        publish: Callable[[Outage | None], None],
        timeout_s: float,
        grace_s: float,
    ) -> None:
        self._publish = publish
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._outage: Outage | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        # Now: where a loss is noticed, there may be no room for a thread.
        threading.Thread(target=self._run, name="OutageNotice", daemon=True).start()

    def begin(self, error: MemoryNodeError) -> None:
        """Show from now on that a node is away, and why."""
        now = time.monotonic()
        grace_s, timeout_s = self._grace_s, self._timeout_s
        self._set(Outage(error.node, error.cause, now, now + grace_s, now + timeout_s))

    def end(self) -> None:
        """Show that all nodes are back."""
        self._set(None)

    def give_up(self, error: MemoryNodeError) -> None:
        """Show that the engine stops, and why."""
        now = time.monotonic()
        self._set(Outage(error.node, error.cause, now, now, now, is_final=True))

    def close(self) -> None:
        """Log nothing any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _set(self, outage: Outage | None) -> None:
        with self._changed:
            self._outage = outage
            self._changed.notify_all()
            self._publish(outage)

    def _run(self) -> None:
        with self._changed:
            while not self._is_closed:
                shown = self._outage
                is_quiet = shown is None or shown.is_final
                self._changed.wait(None if is_quiet else _LOG_EVERY_S)
                is_same = self._outage is shown and not self._is_closed
                if shown is not None and not is_quiet and is_same:
                    self._log(shown)

    def _log(self, outage: Outage) -> None:
        logger.warning(
            "Attention offload: memory node %s is away for %.0f s; requests wait, and "
            "the engine stops in %.0f s (recovery_timeout_s)",
            outage.node,
            time.monotonic() - outage.since_s,
            outage.remaining_s(),
        )
