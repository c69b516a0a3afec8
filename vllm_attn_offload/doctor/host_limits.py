# SPDX-License-Identifier: Apache-2.0
"""Limits of this process that nodes and engines inherit."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.memory_node.connections import MAX_CONNECTIONS
from vllm_attn_offload.protocol.byte_size import byte_size

#: An engine with its processes, or a node with a few engines.
_FEWEST_DESCRIPTORS = 256
#: A local connection of a node shares memory by four descriptors.
_PER_CONNECTION = 4
_RAISE = "Raise it: ulimit -Hn {0}, LimitNOFILE={0} or --ulimit nofile={0}."


def check_descriptors() -> Iterator[Finding]:
    """Look at the hard limit: nodes and vLLM raise the soft one themselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _PER_CONNECTION * MAX_CONNECTIONS
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        yield Finding.ok("descriptors", f"{_count(hard)} files may be open")
        return
    if hard < _FEWEST_DESCRIPTORS:
        finding, found = Finding.fail, f"only {hard:,} files may be open"
    else:
        finding = Finding.warn
        found = (
            f"{hard:,} files may be open: a memory node here serves "
            f"{hard // _PER_CONNECTION} connections, not {MAX_CONNECTIONS}"
        )
    least = f"{_FEWEST_DESCRIPTORS} at least, {wanted:,} for a full memory node"
    yield finding("descriptors", found, least, _RAISE.format(wanted))


def check_locked_memory() -> Iterator[Finding]:
    """Say what --preallocate can lock; nothing else locks memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        found = "any memory may be locked"
    else:
        found = (
            f"{byte_size(soft)} may be locked, which only --preallocate asks for "
            "(ulimit -l)"
        )
    yield Finding.ok("locked memory", found)


def _count(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else f"{limit:,}"
