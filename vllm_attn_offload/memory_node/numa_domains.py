# SPDX-License-Identifier: Apache-2.0
"""Says at start which NUMA domains a node's CPUs, and so its blocks, belong to.

No memory policy is set: the kernel puts a page into the domain of the CPU that touches
it first, and every thread that stores or zeroes blocks runs on the node's CPUs. A
policy that the node was started with (``numactl``) stays.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from vllm_attn_offload.cpu_list import format_cpu_list, parse_cpu_list

logger = logging.getLogger(__name__)

_DOMAINS = Path("/sys/devices/system/node")


def domains_of(
    cpus: Collection[int], directory: Path = _DOMAINS
) -> dict[int, list[int]]:
    """Divide CPUs by NUMA domain.

    Args:
        cpus: Those to look for.
        directory: Where the kernel describes its domains.

    Returns:
        Of every domain with CPUs, also of those with none of ``cpus``, which of them
        belong to it; nothing where the kernel describes none.
    """
    found = {}
    for file in directory.glob("node[0-9]*/cpulist"):
        # Empty for domains of memory alone.
        if text := file.read_text().strip():
            domain = int(file.parent.name.removeprefix("node"))
            found[domain] = sorted(set(parse_cpu_list(text)).intersection(cpus))
    return dict(sorted(found.items()))


def log_numa_domains(cpus: Collection[int], directory: Path = _DOMAINS) -> None:
    """Name the domains of the node's CPUs, where the host has more than one."""
    domains = domains_of(cpus, directory)
    if len(domains) < 2:
        return
    ours = {domain: mine for domain, mine in domains.items() if mine}
    if len(ours) == 1:
        logger.info(
            "CPUs and KV blocks are of NUMA domain %d, of %d", *ours, len(domains)
        )
        return
    logger.warning(
        "CPUs are of NUMA domains %s: a block lies in that of the CPU which stores to "
        "it first, and CPUs of others take longer to read it. Allowed, but a node per "
        "domain is faster: start them with --cpus %s.",
        ", ".join(map(str, ours)),
        " and --cpus ".join(map(format_cpu_list, ours.values())),
    )
