# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of an engine over several hosts, all of which must reach them."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.transport.address import Address

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

_ALLOWED = (
    "Allowed: HOST:PORT of memory nodes that every host of the engine reaches. Start "
    "them with 'vllm-memory-node --listen HOST:PORT --auth-token-file FILE' and write "
    "for example memory_nodes: 10.0.0.7:7600."
)


def check_reachable(engine_args: EngineArgs, config: AttentionOffloadConfig) -> None:
    """Refuse nodes that only one of an engine's hosts reaches, on each of them.

    Raises:
        ValueError: The engine would start local nodes, an address is one of a single
            host, or the files of the credentials are not on this host.
    """
    if engine_args.nnodes == 1:
        return
    check_from_hosts(f"nnodes={engine_args.nnodes}", config)
    # Workers of every host read them, long after this.
    config.credentials.read_token()
    config.credentials.compute_context()


def check_from_hosts(given: str, config: AttentionOffloadConfig) -> None:
    """Refuse nodes that only one of several hosts reaches.

    Args:
        given: What makes them several, in the user's words.
        config: The engine's options.

    Raises:
        ValueError: The engine would start local nodes, or an address is one of a single
            host.
    """
    if not config.memory_nodes:
        raise ValueError(
            f"{given} was given without memory_nodes, and local nodes serve one host. "
            f"{_ALLOWED}"
        )
    for node in (*config.addresses, *config.standby_nodes):
        if problem := _problem(Address.parse(node)):
            raise ValueError(
                f"the memory node {node} was given with {given}, and {problem}. "
                f"{_ALLOWED}"
            )


def _problem(address: Address) -> str:
    """Say why other hosts do not reach an address; "" where they may."""
    if address.path:
        return "only processes of one host reach a Unix socket"
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError:
        return ""  # Whoever connects says what is wrong with the name.
    for _, _, _, _, endpoint in found:
        numeric = str(endpoint[0])
        if _is_of_one_host(numeric):
            return f"{numeric} is each host itself"
    return ""


def _is_of_one_host(numeric: str) -> bool:
    ip = ipaddress.ip_address(numeric)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return ip.is_loopback or ip.is_unspecified
