# SPDX-License-Identifier: Apache-2.0
"""What a container of the chart runs, on this host instead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from node_process import COMMAND

#: Stands in commands of images for the one of this environment.
_PYTHON = "python"


class NodeContainer:
    """The container of a rendered template, with its probes and hooks.

    Args:
        spec: Of the container.
        directory: For what the pod mounts, and for the log.

    Attributes:
        spec: As given.
        directory: As given.
        ports: Its ports by name.
    """

    def __init__(self, spec: dict[str, Any], directory: Path) -> None:
        self.spec, self.directory = spec, directory
        self.ports = {each["name"]: each["containerPort"] for each in spec["ports"]}

    @property
    def arguments(self) -> list[str]:
        """Arguments with the pod's name in them, and mounts below ``directory``."""
        mounts = [each["mountPath"] for each in self.spec.get("volumeMounts", [])]
        arguments = []
        for each in self.spec["args"]:
            for mount in mounts:
                each = each.replace(mount, f"{self.directory}{mount}")
            arguments.append(each.replace("$(POD_NAME)", "memory-nodes-0"))
        return arguments

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run it, perhaps not yet ready, and kill what is left of it."""
        with (self.directory / "node.log").open("wb") as log:
            process = subprocess.Popen([COMMAND, *self.arguments], stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def passes(self, probe: str) -> bool:
        """Ask once, as the kubelet does."""
        spec = self.spec[probe]
        port = self.ports[spec["httpGet"]["port"]]
        timeout_s = spec.get("timeoutSeconds", 1)
        connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            connection.request("GET", spec["httpGet"]["path"])
            return 200 <= connection.getresponse().status < 400
        except OSError:
            return False
        finally:
            connection.close()

    def passes_in_time(self, probe: str) -> bool:
        """Ask until it passes, for no longer than its failures are allowed to take."""
        spec = self.spec[probe]
        deadline = time.monotonic() + spec["periodSeconds"] * spec["failureThreshold"]
        while not self.passes(probe):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def pre_stop(self) -> subprocess.Popen[bytes]:
        """Start the hook."""
        command = self.spec["lifecycle"]["preStop"]["exec"]["command"]
        return subprocess.Popen(on_this_host(command), env=os.environ)


def on_this_host(command: list[str]) -> list[str]:
    """A command of an image, with this environment's Python."""
    assert command[0] == _PYTHON
    return [sys.executable, *command[1:]]
