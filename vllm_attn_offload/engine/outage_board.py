# SPDX-License-Identifier: Apache-2.0
"""Memory in which engines show their outages to the frontends that serve clients."""

from __future__ import annotations

import os

import msgspec

from vllm_attn_offload.engine.outage_notice import Outage

BOARD_VARIABLE = "ATTN_OFFLOAD_OUTAGE_BOARD"
_SLOT_BYTES = 4096
#: More of a node's name and of a cause is not shown.
_MAX_TEXT = 1000


class OutageBoard:
    """One slot per engine, in a memory file of the process that made it.

    The file has no name, so nothing is left of it; engines and API servers are children
    of its maker and find it by their environment. Nothing is opened to write or read,
    which would fail where descriptors are exhausted.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> OutageBoard:
        """Make an empty board that processes started from now on find."""
        board = cls(os.memfd_create("attn-offload-outages"))
        os.environ[BOARD_VARIABLE] = f"/proc/{os.getpid()}/fd/{board._fd}"
        return board

    @classmethod
    def find(cls) -> OutageBoard | None:
        """Open the board of this deployment; None where nobody made one.

        Raises:
            OSError: The process that made it is gone.
        """
        path = os.environ.get(BOARD_VARIABLE)
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC)) if path else None

    def write(self, engine: int, outage: Outage | None) -> None:
        """Show or clear the outage of an engine.

        Args:
            engine: Data-parallel index.
            outage: None: there is none.
        """
        record = b"-"
        if outage is not None:
            node, cause = outage.node[:_MAX_TEXT], outage.cause[:_MAX_TEXT]
            short = msgspec.structs.replace(outage, node=node, cause=cause)
            record = msgspec.json.encode(short)
        slot = record.ljust(_SLOT_BYTES, b"\0")[:_SLOT_BYTES]
        os.pwrite(self._fd, slot, engine * _SLOT_BYTES)

    def read(self) -> list[Outage | None]:
        """Return the outage of every engine that ever showed its state."""
        slots = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        begins = range(0, len(slots), _SLOT_BYTES)
        return [_outage(slots[begin : begin + _SLOT_BYTES]) for begin in begins]


def _outage(slot: bytes) -> Outage | None:
    try:
        return msgspec.json.decode(slot.rstrip(b"\0"), type=Outage)
    except msgspec.DecodeError:
        return None  # Empty, or just being written.
