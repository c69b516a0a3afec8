# SPDX-License-Identifier: Apache-2.0
"""Asks memory nodes for their counters, all at once and with one deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.status.node_look import NodeLook
from vllm_attn_offload.transport.trust import Credentials

#: Requests outlast the deadline of a look, which has the better words for it.
_SLACK_S = 1.0
#: The fastest counts: others may have waited for a CPU.
_NUM_PINGS = 3


class NodeReader:
    """Keeps a connection to each node from look to look.

    Args:
        credentials: What to show nodes, and to ask of them.
        timeout_s: Of a look, whatever the number of nodes.
    """

    def __init__(self, credentials: Credentials, timeout_s: float) -> None:
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._clients: dict[str, ControlClient] = {}
        self._asked: dict[str, Future[NodeLook]] = {}

    def ask(self, addresses: Sequence[str]) -> None:
        """Begin to ask these nodes, for a `read` that follows."""
        for address in addresses:
            asked = self._asked.get(address)
            # One that is still being asked is not asked twice.
            if asked is None or asked.done():
                self._asked[address] = asked = Future()
                # Not an executor, whose threads the end of the command would wait for.
                threading.Thread(
                    target=self._ask, args=(address, asked), daemon=True
                ).start()

    def read(self, addresses: Sequence[str], until_s: float) -> list[NodeLook]:
        """Take the answers of nodes that were asked.

        Args:
            addresses: The nodes.
            until_s: Those without an answer at this time of the monotonic clock are
                said to have none.
        """
        asked_now = [self._asked[address] for address in addresses]
        left_s = max(until_s - time.monotonic(), 0.0)
        wait(asked_now, left_s)
        return [
            asked.result() if asked.done() else self._silent(address, left_s)
            for address, asked in zip(addresses, asked_now, strict=True)
        ]

    def _ask(self, address: str, asked: Future[NodeLook]) -> None:
        asked.set_result(self._look(address))

    def _look(self, address: str) -> NodeLook:
        known = self._clients.pop(address, None)
        if known is not None:
            try:
                return self._ask_client(address, known)
            except Exception:
                known.close()  # The node may have been started again.
        client = None
        try:
            timeout_s = self._timeout_s + _SLACK_S
            client = ControlClient(address, timeout_s, self._credentials)
            return self._ask_client(address, client)
        except Exception as error:
            # Also a token's file that is missing for a moment: other nodes are shown.
            if client is not None:
                client.close()
            state, problem = _failure(error)
            return NodeLook(address, time.monotonic(), state=state, problem=problem)

    def _ask_client(self, address: str, client: ControlClient) -> NodeLook:
        stats = client.stats()
        answered_s = time.monotonic()
        ping_s = min(self._ping_s(client) for _ in range(_NUM_PINGS))
        self._clients[address] = client
        return NodeLook(address, answered_s, stats, ping_s)

    def _ping_s(self, client: ControlClient) -> float:
        started = time.perf_counter()
        client.ping(self._timeout_s + _SLACK_S)
        return time.perf_counter() - started

    def _silent(self, address: str, waited_s: float) -> NodeLook:
        return NodeLook(
            address,
            time.monotonic(),
            state="no answer",
            problem=f"it did not answer within {waited_s:.2g} s. Check that it "
            "runs and that this host reaches it, or raise --timeout-s.",
        )


def _failure(error: Exception) -> tuple[str, str]:
    """Return state and problem of a node that could not be asked."""
    if not isinstance(error, MemoryNodeError):
        return "refuses", f"it could not be asked ({error!r})."
    is_silent = isinstance(error.__cause__, OSError)
    return "no answer" if is_silent else "refuses", error.cause
