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

from vllm_attn_offload.cpu_list import format_cpu_list
from vllm_attn_offload.memory_node.args import parse_options
from vllm_attn_offload.memory_node.connections import MAX_CONNECTIONS, strangers
from vllm_attn_offload.memory_node.escape_filter import EscapeFilter
from vllm_attn_offload.memory_node.huge_pages import log_huge_pages
from vllm_attn_offload.memory_node.memory_claim import MemoryClaim
from vllm_attn_offload.memory_node.node_start import StartError, create_node
from vllm_attn_offload.memory_node.numa_domains import log_numa_domains
from vllm_attn_offload.memory_node.rate_limit_filter import RateLimitFilter
from vllm_attn_offload.memory_node.server import MemoryNode
from vllm_attn_offload.memory_node.service_manager import ServiceManager
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.transport.address import Address

logger = logging.getLogger(__name__)

#: How long a signal may stay unnoticed, in seconds.
_LOOK_S = 1.0
_STDOUT, _STDERR = 1, 2
#: For systemd's TimeoutStartSec, which memory that is being touched would exceed.
_MORE_TIME = {"EXTEND_TIMEOUT_USEC": "60000000"}


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
    # A node with a parent is no service of its own, whatever it inherited.
    manager = ServiceManager({} if options.parent_fd is not None else os.environ)
    try:
        node, claim, arena = create_node(options)
    except StartError as error:
        logger.error("%s", error)
        return 1
    if warning := claim.warning():
        logger.warning("%s", warning)
    if arena is not None:
        arena.touch(stop, tell=lambda text: manager.notify(STATUS=text, **_MORE_TIME))
    if not stop.is_set():
        node.start()
        _announce(node, claim, options)
        where = ", ".join(map(str, node.addresses))
        manager.notify(READY="1", STATUS=f"Serving engines on {where}.")
        manager.watch(lambda: node.is_accepting, stop)
    if options.parent_fd is not None:
        _stop_with_parent(options.parent_fd, stop)
    # The kernel may give a signal to another thread, which ends no wait of this one.
    while not stop.wait(_LOOK_S):
        continue
    logger.info("stopping")
    manager.notify(STOPPING="1", STATUS="Freeing the memory of engines.")
    node.stop()
    if options.parent_fd is not None:
        _remove_directory(node.address)
    return 0


def _remove_directory(address: Address) -> None:
    """Remove what was made for the socket by a parent that may be gone."""
    if address.path:
        with contextlib.suppress(OSError):
            Path(address.path).parent.rmdir()


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


def _announce(
    node: MemoryNode, claim: MemoryClaim, options: argparse.Namespace
) -> None:
    info = node.info()
    logger.info(
        "ready on %s: name %s, device %s, attention kernel %s, %s for KV blocks (%s), "
        "at most %s for frames and plans, CPUs %s",
        ", ".join(map(str, node.addresses)),
        info.name,
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
