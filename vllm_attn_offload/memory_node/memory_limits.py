# SPDX-License-Identifier: Apache-2.0
"""Memory that the control groups of this process leave to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Limit of one group, in bytes, and what is left of it."""

    group: Path
    limit_bytes: int
    free_bytes: int


def memory_limits(
    cgroups: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> Iterator[MemoryLimit]:
    """Yield the limits of this process's group and of those around it.

    Args:
        cgroups: Where the cgroup file systems are mounted, version 1 or 2. In a
            container only the mount itself may exist, which is then its own group.
        groups: The groups of this process, a line for each controller of version 1.
    """
    yield from _with_parents(cgroups, "", *_V2)
    yield from _with_parents(cgroups / "memory", "", *_V1)
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _with_parents(cgroups, path, *_V2)
        elif "memory" in controllers.split(","):
            yield from _with_parents(cgroups / "memory", path, *_V1)


def _with_parents(
    mount: Path, path: str, limit: str, usage: str, cache: str
) -> Iterator[MemoryLimit]:
    relative = Path(path.lstrip("/"))
    for group in [relative, *relative.parents] if path else [Path()]:
        found = mount / group
        try:
            limit_bytes = int((found / limit).read_text())
            used = int((found / usage).read_text())
            used -= _cached_bytes(found / "memory.stat", cache)
        except (OSError, ValueError):
            continue  # no such group, or "max": no limit
        yield MemoryLimit(found, limit_bytes, max(0, limit_bytes - used))


def _cached_bytes(stat: Path, name: str) -> int:
    """Page cache that the kernel drops before it calls a group full."""
    pairs = (line.split() for line in stat.read_text().splitlines())
    return next((int(value) for key, value in pairs if key == name), 0)
