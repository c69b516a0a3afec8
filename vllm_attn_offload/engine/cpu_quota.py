# SPDX-License-Identifier: Apache-2.0
"""CPU time that a container or a service may use, in CPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path


def cpu_quota(
    cgroups: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> float:
    """Return the smallest quota of this process's control groups, in CPUs.

    Args:
        cgroups: Where the cgroup file systems are mounted, version 1 or 2.
        groups: The groups of this process, a line for each controller of version 1.

    Returns:
        Infinity where nothing is limited, or where it cannot be read.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        lines = []
    quotas = [_v2_quota(cgroups), _v1_quota(cgroups / "cpu")]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            quotas += map(_v2_quota, _with_parents(cgroups, path))
        elif "cpu" in controllers.split(","):
            quotas += map(_v1_quota, _with_parents(cgroups / "cpu", path))
    return min(quotas)


def _with_parents(mount: Path, path: str) -> Iterator[Path]:
    """A group and those around it; in a container only the mount itself may exist."""
    group = Path(path.lstrip("/"))
    for each in (group, *group.parents):
        yield mount / each


def _v2_quota(group: Path) -> float:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _v1_quota(group: Path) -> float:
    quota = _read(group / "cpu.cfs_quota_us")
    return _ratio(quota, _read(group / "cpu.cfs_period_us"))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _ratio(quota: str, period: str) -> float:
    """Divide microseconds; ``max`` and -1 mean no quota."""
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return math.inf
    return int(quota) / int(period)
