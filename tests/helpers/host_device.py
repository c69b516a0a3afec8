# SPDX-License-Identifier: Apache-2.0
"""A device of host memory that processes share, as GPUs share theirs."""

from __future__ import annotations

import fcntl
import mmap
import os

import torch


class HostMemory:
    """``DeviceMemory`` of a host device; NaN until somebody writes."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.bytes = torch.frombuffer(
            mmap.mmap(descriptor, num_bytes), dtype=torch.uint8
        )
        self.num_closed = 0

    def clear(self) -> None:
        self.bytes.zero_()

    def close(self) -> None:
        self.num_closed += 1
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class HostDevice:
    """``SharedDevice`` of host memory.

    Args:
        name: What tells it from other devices.
        problem: Why it shares nothing.
    """

    def __init__(self, name: str = "device 0", problem: str = "") -> None:
        self.name = name
        self.problem = problem
        self.memory: list[HostMemory] = []

    def allocate(self, num_bytes: int) -> HostMemory:
        self._raise_if_broken()
        descriptor = os.memfd_create("device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.memory.append(HostMemory(descriptor, num_bytes))
        self.memory[-1].bytes.fill_(0xFF)
        return self.memory[-1]

    def map(self, descriptor: int, num_bytes: int) -> HostMemory:
        try:
            self._raise_if_broken()
            # What a driver does: it knows its own descriptors, and their size.
            if os.fstat(descriptor).st_size != num_bytes:
                raise OSError("this is no memory of that size")
        except OSError:
            os.close(descriptor)
            raise
        self.memory.append(HostMemory(descriptor, num_bytes))
        return self.memory[-1]

    def _raise_if_broken(self) -> None:
        if self.problem:
            raise OSError(self.problem)
