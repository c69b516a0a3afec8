# SPDX-License-Identifier: Apache-2.0
"""Host memory that a node touches at start, and that sessions take blocks from."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import mmap
import resource
import threading
import time
from collections.abc import Callable

from vllm_attn_offload.protocol.byte_size import byte_size

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_CHUNK_BYTES = 256 << 20
_REPORT_S = 5.0


class KVArena:
    """One mapping, of which regions are taken and given back; safe for threads.

    Args:
        num_bytes: Budget of the node.

    Raises:
        OSError: The kernel does not map so much.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = _aligned(num_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, self._num_bytes, flags=flags)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._address = _address(self._view)
        self._lock = threading.Lock()
        self._holes = [(0, self._num_bytes)]  # (begin, end), in order, never adjacent

    def touch(
        self,
        stop: threading.Event,
        report_s: float = _REPORT_S,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take the memory from the kernel, and lock it where that is allowed.

        Args:
            stop: Gives up in between once it is set.
            report_s: Seconds between two log lines about the progress.
            tell: Called with each of these lines.
        """
        started = reported = time.monotonic()
        is_locked = True
        for begin in range(0, self._num_bytes, _CHUNK_BYTES):
            if stop.is_set():
                return
            address = self._address + begin
            num_bytes = min(_CHUNK_BYTES, self._num_bytes - begin)
            ctypes.memset(address, 0, num_bytes)
            is_locked = is_locked and _lock_pages(address, num_bytes)
            if time.monotonic() >= reported + report_s:
                reported = time.monotonic()
                text = self._progress(begin + num_bytes, reported - started)
                logger.info("%s", text)
                tell(text)
        self._report(is_locked)

    def allocate(self, num_bytes: int) -> memoryview | None:
        """Take zeroed memory; None where no hole is long enough."""
        needed = _aligned(num_bytes)
        with self._lock:
            for index, (begin, end) in enumerate(self._holes):
                if end - begin >= needed:
                    rest = (begin + needed, end)
                    self._holes[index : index + 1] = [rest] if rest[0] < end else []
                    return self._view[begin : begin + num_bytes]
        return None

    def free(self, region: memoryview) -> None:
        """Give back and zero what ``allocate`` returned, which nobody uses any more."""
        address, needed = _address(region), _aligned(len(region))
        region.release()
        # Not under the lock: 1 GiB takes about 0.1 s.
        ctypes.memset(address, 0, needed)
        begin = address - self._address
        end = begin + needed
        with self._lock:
            index = bisect.bisect(self._holes, (begin, end))
            if index < len(self._holes) and self._holes[index][0] == end:
                end = self._holes.pop(index)[1]
            if index and self._holes[index - 1][1] == begin:
                index -= 1
                begin = self._holes.pop(index)[0]
            self._holes.insert(index, (begin, end))

    def _progress(self, num_bytes: int, elapsed_s: float) -> str:
        share = num_bytes / self._num_bytes
        return (
            f"touched {byte_size(num_bytes)} of {byte_size(self._num_bytes)} "
            f"({share:.0%}) in {elapsed_s:.0f} s, about "
            f"{elapsed_s / share - elapsed_s:.0f} s to go"
        )

    def _report(self, is_locked: bool) -> None:
        total = byte_size(self._num_bytes)
        if is_locked:
            logger.info("touched %s and locked them in memory", total)
            return
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        logger.warning(
            "touched %s, but RLIMIT_MEMLOCK=%s does not let this process lock them in "
            "memory, so they may be swapped out. Raise it (ulimit -l, or LimitMEMLOCK "
            "of systemd), or turn swap off.",
            total,
            byte_size(limit),
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _lock_pages(address: int, num_bytes: int) -> bool:
    mlock = ctypes.CDLL(None).mlock
    mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return bool(mlock(address, num_bytes) == 0)
