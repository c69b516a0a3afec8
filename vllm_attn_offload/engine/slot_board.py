# SPDX-License-Identifier: Apache-2.0
"""Memory in which the engines of a deployment show their frontends something."""

from __future__ import annotations

import os
from typing import ClassVar, Self


class SlotBoard:
    """One slot per engine, in a memory file of the process that made it.

    The file has no name, so nothing is left of it on a disk; engines and API servers
    are children of its maker and find it by their environment. Nothing is opened to
    write or read, which would fail where descriptors are exhausted.
    """

    #: Environment variable that carries the file's path to processes of the deployment.
    variable: ClassVar[str]
    file_name: ClassVar[str]
    slot_bytes: ClassVar[int]

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> Self:
        """Make an empty board that processes started from now on find."""
        board = cls(os.memfd_create(cls.file_name))
        os.fchmod(board._fd, 0o600)
        os.environ[cls.variable] = f"/proc/{os.getpid()}/fd/{board._fd}"
        return board

    @classmethod
    def find(cls) -> Self | None:
        """Open the board of this deployment; None where nobody made one.

        Raises:
            OSError: The process that made it is gone.
        """
        path = os.environ.get(cls.variable)
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC)) if path else None

    def close(self) -> None:
        """Let go of the file; nothing can be written or read afterwards."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write_slot(self, engine: int, record: bytes) -> None:
        slot = record.ljust(self.slot_bytes, b"\0")[: self.slot_bytes]
        os.pwrite(self._fd, slot, engine * self.slot_bytes)

    def _read_slots(self) -> list[bytes]:
        """Return what every engine shows, without padding."""
        size = self.slot_bytes
        slots = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        begins = range(0, len(slots), size)
        return [slots[begin : begin + size].rstrip(b"\0") for begin in begins]
