# SPDX-License-Identifier: Apache-2.0
"""Looks at memory nodes, and at the server that names them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_attn_offload.status.node_look import NodeLook
from vllm_attn_offload.status.node_reader import NodeReader
from vllm_attn_offload.status.node_report import NodeReport
from vllm_attn_offload.status.report import Report
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import Credentials

if TYPE_CHECKING:
    from vllm_attn_offload.status.engine_answer import EngineAnswer
    from vllm_attn_offload.status.engine_server import EngineServer


class LookTaker:
    """Remembers each look for the rates of the next one.

    Args:
        addresses: Memory nodes, as the user wrote them.
        engine_url: A server whose ``/metrics`` name more of them; empty: none.
        credentials: What to show nodes, and to ask of them.
        timeout_s: Deadline for the server and all nodes together.

    Raises:
        ValueError: There is nothing to look at, or an address, the URL or a file of the
            credentials is wrong.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        engine_url: str,
        credentials: Credentials,
        timeout_s: float,
    ) -> None:
        if not addresses and not engine_url:
            raise ValueError(
                "no ADDRESS and no --engine was given. Allowed: addresses of memory "
                "nodes, or the URL of a server that uses some. Write for example "
                "127.0.0.1:7600, or --engine http://localhost:8000."
            )
        for address in addresses:
            Address.parse(address)
        # Every connection reads them; what is wrong now is said now.
        credentials.read_token()
        credentials.compute_context()
        self._addresses = addresses
        self._server = _server(engine_url, timeout_s) if engine_url else None
        self._reader = NodeReader(credentials, timeout_s)
        self._timeout_s = timeout_s
        self._before: dict[str, NodeLook] = {}

    def look(self, *, has_rates: bool) -> Report:
        """Ask everybody once.

        Args:
            has_rates: Whether rates are wanted, which the first look does not have.
        """
        until_s = time.monotonic() + self._timeout_s
        # Nodes that are known do not wait for the server.
        known = list(dict.fromkeys((*self._addresses, *self._before)))
        self._reader.ask(known)
        answer = self._engine_answer(until_s)
        named = answer.addresses if answer else []
        # A server that is silent for once does not hide its nodes.
        if answer and answer.problem:
            named = list(self._before)
        addresses = list(dict.fromkeys((*self._addresses, *named)))
        self._reader.ask([each for each in addresses if each not in known])
        looks = self._reader.read(addresses, until_s)
        nodes = [NodeReport.of(self._before.get(look.address), look) for look in looks]
        self._before = {look.address: look for look in looks}
        return Report(nodes, answer, time.time(), has_rates)

    def _engine_answer(self, until_s: float) -> EngineAnswer | None:
        if self._server is None:
            return None
        self._server.ask()
        return self._server.read(until_s)


def _server(url: str, timeout_s: float) -> EngineServer:
    # Its parser takes longer to import than nodes to answer.
    from vllm_attn_offload.status.engine_server import EngineServer

    return EngineServer(url, timeout_s)
