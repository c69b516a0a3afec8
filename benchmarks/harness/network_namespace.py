# SPDX-License-Identifier: Apache-2.0
"""A second host: a network namespace with an address of its own on a real link."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "10.213.77"
_NAME = "attn-offload-"


@dataclass(frozen=True)
class RemoteHost:
    """Another host for memory nodes.

    Args:
        address: Its address on the link.
        command: Prefix that runs a command there.
        devices: Both ends of the link, ours first.
    """

    address: str
    command: tuple[str, ...]
    devices: tuple[str, str] = ("", "")

    def limit_bandwidth(self, mbit_per_s: int) -> None:
        """Send at most so much in either direction, by the kernel's token bucket.

        Args:
            mbit_per_s: Payload and headers; 0: no limit any more.
        """
        discipline: tuple[str, ...] = ("pfifo",)
        if mbit_per_s:
            # A burst of 10 ms: the kernel's timers refill the bucket.
            burst = ("burst", str(mbit_per_s * 1250), "latency", "1s")
            discipline = ("tbf", "rate", f"{mbit_per_s}mbit", *burst)
        for device, prefix in zip(self.devices, ((), self.command), strict=True):
            # "replace" also where no discipline was set before.
            change = ("tc", "qdisc", "replace", "dev", device, "root")
            _run(*prefix, *change, *discipline)


@contextmanager
def remote_host() -> Iterator[RemoteHost]:
    """Make the namespace and a pair of virtual Ethernet devices; needs root.

    Raises:
        PermissionError: This process may not.
    """
    remove_left_over(_NAME)
    name = f"{_NAME}{os.getpid()}"
    ours, theirs = f"aoa{os.getpid() % 100000}", f"aob{os.getpid() % 100000}"
    inside = ("ip", "netns", "exec", name)
    try:
        _run("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"no network namespace can be made: {error}") from error
    try:
        _run("ip", "link", "add", ours, "type", "veth", "peer", theirs, "netns", name)
        _run("ip", "addr", "add", f"{_PREFIX}.1/24", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        _run(*inside, "ip", "addr", "add", f"{_PREFIX}.2/24", "dev", theirs)
        _run(*inside, "ip", "link", "set", theirs, "up")
        yield RemoteHost(f"{_PREFIX}.2", inside, (ours, theirs))
    finally:
        _run("ip", "netns", "del", name)


def remove_left_over(prefix: str) -> None:
    """Delete namespaces of processes that were killed, which may have our address.

    Args:
        prefix: Of their names, which end with the process's id.
    """
    for file in Path("/run/netns").glob(f"{prefix}*"):
        if not Path("/proc", file.name.rpartition("-")[2]).exists():
            subprocess.run(("ip", "netns", "del", file.name), check=False, timeout=10)


def run_ip(*arguments: str) -> None:
    """Run ``ip``.

    Raises:
        CalledProcessError: It failed.
        OSError: It is not there.
    """
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)
