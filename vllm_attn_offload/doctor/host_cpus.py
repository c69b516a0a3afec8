# SPDX-License-Identifier: Apache-2.0
"""CPUs of this host against the threads that would keep them busy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from vllm_attn_offload.cpu_list import format_cpu_list, parse_cpu_list
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.engine.cpu_quota import cpu_quota
from vllm_attn_offload.memory_node.numa_domains import domains_of

_NAME = "CPUs"
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_THREADS = "OMP_NUM_THREADS"


def check_cpus(case: Case) -> Iterator[Finding]:
    """Look at the CPUs of this process, a quota, and what options ask of them."""
    cpus, quota = os.sched_getaffinity(0), cpu_quota()
    limit = "no quota" if math.isinf(quota) else f"a quota of {quota:g} CPUs"
    yield Finding.ok(_NAME, f"{len(cpus)} ({format_cpu_list(cpus)}), {limit}")
    if quota < 1:
        yield Finding.warn(
            _NAME,
            f"a quota of {quota:g} CPUs stops every thread for a part of the time",
            "1 CPU at least, 2 where an engine and its nodes share a host",
            "Raise the container's limit (cpu.max, --cpus, resources.limits.cpu).",
        )
    yield from _absent_cpus(case, cpus)
    yield from _busy_threads(case, cpus)


def _absent_cpus(case: Case, cpus: set[int]) -> Iterator[Finding]:
    given = {
        "local_node_cpus": case.config.local_node_cpus if case.starts_nodes else ""
    }
    binding = os.environ.get(_BINDING, "")
    if case.is_engine_host and binding not in ("auto", "nobind"):
        given[_BINDING] = binding.replace("|", ",")
    for name, text in given.items():
        try:
            absent = set(parse_cpu_list(text)) - cpus if text else set()
        except ValueError as error:
            yield Finding.of_error(_NAME, f"{name}: {error}", "CPU numbers")
            continue
        if absent:
            yield Finding.fail(
                _NAME,
                f"{name} names CPU {format_cpu_list(absent)}, which this process may "
                "not use",
                format_cpu_list(cpus),
                f"Choose from these, or leave {name} out.",
            )


def _busy_threads(case: Case, cpus: set[int]) -> Iterator[Finding]:
    """Threads that the user asked for, all of which spin while they wait.

    Unbound workers and nodes divide the CPUs, or take turns.
    """
    threads = os.environ.get(_THREADS, "")
    if threads.isdecimal() and int(threads) > len(cpus):
        yield Finding.warn(
            _NAME,
            f"{_THREADS}={threads} for {len(cpus)} CPUs: threads wait for each other",
            f"{len(cpus)} at most",
            f"Unset {_THREADS}.",
        )
    both = _bound_twice(case)
    if both:
        yield Finding.warn(
            _NAME,
            f"CPU {format_cpu_list(both)} is of workers ({_BINDING}) and of memory "
            "nodes (local_node_cpus): two threads spin on each",
            "CPUs of their own for workers and nodes",
            f"Take them out of {_BINDING} or of local_node_cpus; or give neither, and "
            "both take turns.",
        )


def _bound_twice(case: Case) -> set[int]:
    binding = os.environ.get(_BINDING, "").replace("|", ",")
    if not (case.starts_nodes and case.config.local_node_cpus):
        return set()
    try:
        return set(parse_cpu_list(binding)) & set(
            parse_cpu_list(case.config.local_node_cpus)
        )
    except ValueError:  # auto, nobind, or said already
        return set()


def check_numa(directory: Path | None = None) -> Iterator[Finding]:
    """Look whether the CPUs lie in one NUMA domain.

    Args:
        directory: Where the kernel describes its domains, if not where it does.
    """
    cpus = os.sched_getaffinity(0)
    domains = domains_of(cpus, directory) if directory else domains_of(cpus)
    ours = {domain: mine for domain, mine in domains.items() if mine}
    if len(ours) < 2:
        of_several = f" of {len(domains)}" if len(domains) > 1 else ""
        yield Finding.ok("NUMA", f"all CPUs lie in one domain{of_several}")
        return
    lists = list(map(format_cpu_list, ours.values()))
    yield Finding.warn(
        "NUMA",
        f"CPUs lie in domains {', '.join(map(str, ours))}: one memory node on all of "
        "them reads blocks of other domains",
        "a memory node for each domain",
        f"Start one with each of: --cpus {', --cpus '.join(lists)}; an engine starts "
        f"them with num_local_nodes {len(ours)}.",
    )
