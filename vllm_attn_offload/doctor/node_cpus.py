# SPDX-License-Identifier: Apache-2.0
"""CPUs on which a node and something else of its host would spin at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import combinations

from vllm_attn_offload.cpu_list import format_cpu_list, parse_cpu_list
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.protocol.messages import Stats
from vllm_attn_offload.transport.address import host_id

_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


def check_node_cpus(case: Case, answers: Sequence[Stats]) -> Iterator[Finding]:
    """Compare the CPUs of nodes with each other's and with those of workers here."""
    for one, other in combinations(answers, 2):
        is_same = one.node.host_id == other.node.host_id != ""
        both = set(one.cpu_ids) & set(other.cpu_ids)
        if is_same and both and one.node.instance != other.node.instance:
            yield Finding.warn(
                "CPUs",
                f"{one.node.name} and {other.node.name} both have CPUs "
                f"{format_cpu_list(both)} of one host",
                "CPUs of their own for nodes that attend at the same time",
                "Start each with its own --cpus.",
            )
    if not case.computes_on_cpus:
        return
    workers = _worker_cpus()
    for each in answers:
        both = workers & set(each.cpu_ids)
        if both and each.node.host_id == host_id() != "":
            yield Finding.warn(
                "CPUs",
                f"{each.node.name} has CPUs {format_cpu_list(both)} of this host, "
                "which a worker here would have, too: two threads spin on each",
                "CPUs of their own for workers and nodes",
                f"Start the node with --cpus, and name the others in {_BINDING}; or "
                "leave memory_nodes out: an engine and its own node take turns.",
            )


def _worker_cpus() -> set[int]:
    """Those that the user binds workers to, or all of this process."""
    try:
        return set(parse_cpu_list(os.environ.get(_BINDING, "").replace("|", ",")))
    except ValueError:  # not given, auto or nobind
        return os.sched_getaffinity(0)
