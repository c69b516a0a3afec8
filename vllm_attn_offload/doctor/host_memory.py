# SPDX-License-Identifier: Apache-2.0
"""Memory of this host for weights and for local memory nodes, and its pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.memory_node.capacity import available_host_bytes
from vllm_attn_offload.memory_node.huge_pages import small_pages_problem
from vllm_attn_offload.memory_node.memory_limits import MemoryLimit, memory_limits
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.messages import GIB

_NAME = "memory"
_LEAST_BYTES = 256 << 20
#: vLLM's processes of an engine pass messages in rings that grow to about this size.
_SHARED_BYTES = 256 << 20
_SHARED_MEMORY = Path("/dev/shm")


def check_memory(case: Case) -> Iterator[Finding]:
    """Compare what is free with what weights and local nodes take."""
    host = psutil.virtual_memory()
    limits = [each for each in memory_limits() if each.limit_bytes < host.total]
    tightest = min(limits, key=lambda each: each.free_bytes, default=None)
    available = available_host_bytes()
    yield _too_little(case, available, tightest) or Finding.ok(
        _NAME,
        f"{byte_size(available)} are available of {byte_size(host.total)}"
        + (_of_group(tightest) or ", and no control group limits them"),
    )


def _too_little(
    case: Case, available: int, tightest: MemoryLimit | None
) -> Finding | None:
    needs = {f"a process needs {byte_size(_LEAST_BYTES)}": _LEAST_BYTES}
    shape = case.model_shape()
    if case.computes_on_cpus and shape is not None:
        weights = int(shape.weight_bytes)
        needs[f"the weights of {shape.name} take {byte_size(weights)}"] = weights
    if case.starts_nodes and case.config.kv_cache_gib is not None:
        num_nodes = case.config.num_local_nodes
        local = int(case.config.kv_cache_gib * num_nodes * GIB)
        needs[f"{num_nodes} local memory node(s) take {byte_size(local)}"] = local
    wanted = sum(needs.values())
    if wanted <= available:
        return None
    return Finding.fail(
        _NAME,
        f"{byte_size(available)} are available{_of_group(tightest)}, and "
        f"{', '.join(needs)}",
        f"{byte_size(wanted)} at least",
        "Stop other processes, raise the limit of the control group, take a smaller "
        "kv_cache_gib or model, or another host.",
    )


def _of_group(limit: MemoryLimit | None) -> str:
    if limit is None:
        return ""
    return f" (control group {limit.group} allows {byte_size(limit.limit_bytes)})"


def check_huge_pages() -> Iterator[Finding]:
    """Ask whether blocks would lie in huge pages."""
    problem = small_pages_problem()
    if not problem:
        yield Finding.ok("huge pages", "KV blocks lie in them while some are free")
        return
    found = Finding.of_error("huge pages", f"{problem}.", "madvise, or always")
    yield Finding.warn("huge pages", found.found, found.allowed, found.do)


def check_shared_memory() -> Iterator[Finding]:
    """Look at /dev/shm, which containers get little of."""
    status = os.statvfs(_SHARED_MEMORY)
    total, free = (status.f_frsize * n for n in (status.f_blocks, status.f_bavail))
    if free >= _SHARED_BYTES:
        yield Finding.ok("/dev/shm", f"{byte_size(free)} are free")
        return
    yield Finding.warn(
        "/dev/shm",
        f"{byte_size(free)} of {byte_size(total)} are free, where vLLM's processes "
        "share messages",
        f"{byte_size(_SHARED_BYTES)} for each engine",
        "Start the container with --shm-size 1g or --ipc host, in Kubernetes with an "
        "emptyDir of medium Memory there.",
    )
