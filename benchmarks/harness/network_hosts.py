# SPDX-License-Identifier: Apache-2.0
"""Several hosts: namespaces on a bridge, each with shared memory of its own.

vLLM tells hosts apart by shared memory, which network namespaces have in common.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness.network_namespace import RemoteHost, remove_left_over, run_ip

_NAME = "attn-offload-host-"
_BRIDGE = "aohosts"
_OWN_MEMORY = "mount -t tmpfs tmpfs /dev/shm && echo ready && exec cat"
#: The device of a host in its own namespace.
DEVICE = "eth0"


@contextmanager
def network_hosts(num_hosts: int) -> Iterator[list[RemoteHost]]:
    """Make hosts that reach each other, and that this process reaches; needs root.

    What a host's command prefix starts has its shared memory.

    Raises:
        PermissionError: This process may not.
    """
    remove_left_over(_NAME)
    _remove_left_over_bridges()
    bridge, network = f"{_BRIDGE}{os.getpid()}", f"10.214.{os.getpid() % 255}"
    with ExitStack() as stack:
        try:
            run_ip("link", "add", bridge, "type", "bridge")
        except (OSError, subprocess.CalledProcessError) as error:
            raise PermissionError(f"no bridge can be made: {error}") from error
        stack.callback(run_ip, "link", "del", bridge)
        run_ip("addr", "add", f"{network}.1/24", "dev", bridge)
        run_ip("link", "set", bridge, "up")
        yield [
            stack.enter_context(_host(bridge, f"{network}.{index + 2}", index))
            for index in range(num_hosts)
        ]


@contextmanager
def _host(bridge: str, address: str, index: int) -> Iterator[RemoteHost]:
    name, ours = f"{_NAME}{index}-{os.getpid()}", f"ao{index}-{os.getpid()}"
    run_ip("netns", "add", name)
    try:
        run_ip("link", "add", ours, "type", "veth", "peer", DEVICE, "netns", name)
        run_ip("link", "set", ours, "master", bridge, "up")
        run_ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            run_ip("-n", name, "link", "set", device, "up")
        with _mounts(name) as pid:
            inside = ("nsenter", "--target", str(pid), "--mount", "--net", "--")
            yield RemoteHost(address, inside, (ours, DEVICE))
    finally:
        run_ip("netns", "del", name)


@contextmanager
def _mounts(name: str) -> Iterator[int]:
    """Keep a process that has a namespace, and mounts of its own; yields its id."""
    command = ("ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c")
    with subprocess.Popen(
        (*command, _OWN_MEMORY), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as keeper:
        assert keeper.stdout is not None
        try:
            if keeper.stdout.readline() != b"ready\n":
                raise PermissionError(f"{name} can have no shared memory of its own")
            yield keeper.pid
        finally:
            keeper.kill()


def _remove_left_over_bridges() -> None:
    for device in Path("/sys/class/net").glob(f"{_BRIDGE}*"):
        if not Path("/proc", device.name.removeprefix(_BRIDGE)).exists():
            subprocess.run(("ip", "link", "del", device.name), check=False, timeout=10)
