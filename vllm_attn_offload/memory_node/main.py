# SPDX-License-Identifier: Apache-2.0
"""Life of the ``vllm-memory-node`` process: check, listen, announce, wait, stop."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from vllm_attn_offload.cpu_list import format_cpu_list
from vllm_attn_offload.memory_node.args import parse_options
from vllm_attn_offload.memory_node.capacity import CapacityError
from vllm_attn_offload.memory_node.connections import MAX_CONNECTIONS, strangers
from vllm_attn_offload.memory_node.decode_attention import (
    create_decode_attention,
)
from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.escape_filter import EscapeFilter
from vllm_attn_offload.memory_node.huge_pages import log_huge_pages
from vllm_attn_offload.memory_node.kv_arena import KVArena
from vllm_attn_offload.memory_node.memory_claim import MemoryClaim, claim_memory
from vllm_attn_offload.memory_node.numa_domains import log_numa_domains
from vllm_attn_offload.memory_node.rate_limit_filter import RateLimitFilter
from vllm_attn_offload.memory_node.server import MemoryNode
from vllm_attn_offload.metrics import StatsCollector
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.transport.trust import Credentials

logger = logging.getLogger(__name__)

_STDOUT, _STDERR = 1, 2


class _StartError(RuntimeError):
    """The node cannot start; the message says why and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Run one memory node until SIGTERM, SIGINT or the end of its parent."""
    options = parse_options(argv)
    _begin_logging()
    _raise_descriptor_limit()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.cpus:
        os.sched_setaffinity(0, options.cpus)
    try:
        claim = claim_memory(options.kv_cache_gib, options.device)
        arena = _create_arena(claim) if options.preallocate else None
        node = _create_node(options, claim.kv_bytes, arena)
    except (_StartError, CapacityError) as error:
        logger.error("%s", error)
        return 1
    if warning := claim.warning():
        logger.warning("%s", warning)
    if arena is not None:
        arena.touch(stop)
    if not stop.is_set():
        node.start()
        _announce(node, claim, options)
    if options.parent_fd is not None:
        _stop_with_parent(options.parent_fd, stop)
    stop.wait()
    logger.info("stopping")
    node.stop()
    if options.parent_fd is not None and options.listen.path:
        # Made for the socket by a parent that may be gone.
        with contextlib.suppress(OSError):
            Path(options.listen.path).parent.rmdir()
    return 0


def _begin_logging() -> None:
    logging.basicConfig(
        level=logging.INFO,
        format="(MemoryNode pid=%(process)d) %(levelname)s %(asctime)s %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(EscapeFilter())
    strangers.addFilter(RateLimitFilter(burst=500, per_s=5))


def _raise_descriptor_limit() -> None:
    """Room for every connection and for the shared memory of the local ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MAX_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _create_arena(claim: MemoryClaim) -> KVArena:
    try:
        return KVArena(claim.kv_bytes)
    except OSError as error:
        raise _StartError(
            f"--preallocate of {byte_size(claim.kv_bytes)} failed: {error.strerror}. "
            "Allowed: what the kernel maps. Lower --kv-cache-gib, or leave "
            "--preallocate out."
        ) from error


def _create_node(
    options: argparse.Namespace, kv_bytes: int, arena: KVArena | None
) -> MemoryNode:
    """Claim the metrics port and the address.

    Raises:
        _StartError: One of them cannot be had.
    """
    credentials = _credentials(options)
    registry = CollectorRegistry()
    if options.metrics_port is not None:
        _serve_metrics(options.metrics_port, registry)
    attention = _create_attention(options)
    attention.arena = arena
    try:
        node = MemoryNode(
            options.listen, attention, options.device, kv_bytes, credentials
        )
    except OSError as error:
        raise _StartError(
            f"cannot listen on {options.listen}: {error.strerror or error}. Choose a "
            "free address with --listen, or stop the process that holds this one."
        ) from error
    registry.register(StatsCollector(lambda: {str(node.address): node.stats()}))
    return node


def _credentials(options: argparse.Namespace) -> Credentials:
    if options.insecure and not options.listen.is_local:
        logger.warning(
            "--insecure: whoever reaches %s may use this node, and read and change "
            "what engines send",
            options.listen,
        )
    elif options.auth_token_file and not (options.tls_cert or options.listen.is_local):
        logger.warning(
            "engines on %s must know the token, but queries, keys and values travel "
            "unencrypted: use --tls-cert, --tls-key and --tls-ca where others may "
            "listen in",
            options.listen,
        )
    credentials = Credentials(
        options.auth_token_file, options.tls_cert, options.tls_key, options.tls_ca
    )
    try:
        # Every connection reads them; what is wrong now is said now.
        credentials.read_token()
        credentials.node_context()
    except ValueError as error:
        raise _StartError(str(error)) from error
    return credentials


def _create_attention(options: argparse.Namespace) -> DecodeAttention[Any, Any]:
    try:
        return create_decode_attention(options.attention_kernel, options.device)
    except ValueError as error:
        raise _StartError(str(error)) from error


def _serve_metrics(port: int, registry: CollectorRegistry) -> None:
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except (OSError, OverflowError) as error:
        raise _StartError(
            f"cannot serve metrics on 127.0.0.1:{port}: {error}. Choose a free "
            "--metrics-port, or leave it out."
        ) from error


def _announce(
    node: MemoryNode, claim: MemoryClaim, options: argparse.Namespace
) -> None:
    info = node.info()
    logger.info(
        "ready on %s: device %s, attention kernel %s, %s for KV blocks (%s), at most "
        "%s for frames and plans, CPUs %s",
        node.address,
        info.device,
        info.attention_kernel,
        byte_size(info.kv_bytes_total),
        claim.describe(),
        byte_size(node.max_frame_bytes),
        format_cpu_list(os.sched_getaffinity(0)),
    )
    if options.device == "cpu":
        log_huge_pages()
        log_numa_domains(os.sched_getaffinity(0))
    if options.parent_fd is not None:
        # The parent kept what was said until now, and passes stdout for all else.
        os.dup2(_STDOUT, _STDERR)
    if options.ready_fd is not None:
        # A parent that is gone already is noticed by its other pipe.
        with contextlib.suppress(BrokenPipeError):
            os.write(options.ready_fd, f"{node.address}\n".encode())
        os.close(options.ready_fd)


def _stop_with_parent(parent_fd: int, stop: threading.Event) -> None:
    """The parent holds the other end of a pipe: end of file means that it is gone."""

    def watch() -> None:
        while os.read(parent_fd, 1):
            continue
        logger.info("the process that started this node has ended")
        stop.set()

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
