# SPDX-License-Identifier: Apache-2.0
"""Makes a node out of its options, or says why that is not possible."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from vllm_attn_offload.memory_node.capacity import CapacityError
from vllm_attn_offload.memory_node.decode_attention import (
    create_decode_attention,
)
from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.health_server import HealthServer
from vllm_attn_offload.memory_node.kv_arena import KVArena
from vllm_attn_offload.memory_node.memory_claim import MemoryClaim, claim_memory
from vllm_attn_offload.memory_node.server import MemoryNode
from vllm_attn_offload.metrics import StatsCollector
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import Credentials

logger = logging.getLogger(__name__)


class StartError(RuntimeError):
    """The node cannot start; the message says why and what to do."""


def create_node(
    options: argparse.Namespace,
) -> tuple[MemoryNode, MemoryClaim, KVArena | None]:
    """Claim memory, the address of metrics and health, and those for engines.

    Metrics and health are served from then on, engines once the node was started.

    Returns:
        The node, its memory, and with --preallocate the mapping, not touched yet.

    Raises:
        StartError: One of them cannot be had.
    """
    try:
        claim = claim_memory(options.kv_cache_gib, options.device)
    except CapacityError as error:
        raise StartError(str(error)) from error
    arena = _create_arena(claim) if options.preallocate else None
    credentials = _credentials(options)
    registry = CollectorRegistry()
    health = _serve_health(options, registry)
    attention = _create_attention(options)
    attention.arena = arena
    try:
        node = MemoryNode(
            options.listen,
            attention,
            options.device,
            claim.kv_bytes,
            credentials,
            options.name or "",
        )
    except OSError as error:
        raise StartError(
            f"cannot listen on {error.filename}: {error.strerror or error}. Choose a "
            "free address with --listen, or stop the process that holds this one."
        ) from error
    address = str(node.address)
    registry.register(
        StatsCollector(
            lambda: {address: node.stats()}, lambda: {address: node.state.value}
        )
    )
    if health is not None:
        health.read_state = lambda: node.state
    return node, claim, arena


def _create_arena(claim: MemoryClaim) -> KVArena:
    try:
        return KVArena(claim.kv_bytes)
    except OSError as error:
        raise StartError(
            f"--preallocate of {byte_size(claim.kv_bytes)} failed: {error.strerror}. "
            "Allowed: what the kernel maps. Lower --kv-cache-gib, or leave "
            "--preallocate out."
        ) from error


def _credentials(options: argparse.Namespace) -> Credentials:
    remote = ", ".join(str(each) for each in options.listen if not each.is_local)
    if options.insecure and remote:
        logger.warning(
            "--insecure: whoever reaches %s may use this node, and read and change "
            "what engines send",
            remote,
        )
    elif options.auth_token_file and remote and not options.tls_cert:
        logger.warning(
            "engines on %s must know the token, but queries, keys and values travel "
            "unencrypted: use --tls-cert, --tls-key and --tls-ca where others may "
            "listen in",
            remote,
        )
    credentials = Credentials(
        options.auth_token_file, options.tls_cert, options.tls_key, options.tls_ca
    )
    try:
        # Every connection reads them; what is wrong now is said now.
        credentials.read_token()
        credentials.node_context()
    except ValueError as error:
        raise StartError(str(error)) from error
    return credentials


def _create_attention(options: argparse.Namespace) -> DecodeAttention[Any, Any]:
    try:
        return create_decode_attention(options.attention_kernel, options.device)
    except ValueError as error:
        raise StartError(str(error)) from error


def _serve_health(
    options: argparse.Namespace, registry: CollectorRegistry
) -> HealthServer | None:
    address: Address | None = options.metrics_listen
    if address is None:
        return None
    ProcessCollector(registry=registry)
    try:
        server = HealthServer(address, registry)
    except OSError as error:
        option = (
            "--metrics-listen" if options.metrics_port is None else "--metrics-port"
        )
        raise StartError(
            f"cannot serve metrics on {address}: {error}. Choose a free {option}, or "
            "leave it out."
        ) from error
    logger.info("metrics and health on http://%s", server.address)
    return server
