# SPDX-License-Identifier: Apache-2.0
"""Threads of the compiled CPU kernels."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress

from vllm_attn_offload.native.attention import CpuKernelLibrary

logger = logging.getLogger(__name__)

_SPIN_US = 50


class CppThreads:
    """Pools of a node's threads: on all of its CPUs, and on their second half.

    A thread is on each CPU: that of the calling session on the first, pinned ones on
    the others.

    Args:
        library: The built library.
        cpu_ids: CPUs of the node.
    """

    def __init__(self, library: CpuKernelLibrary, cpu_ids: Sequence[int]) -> None:
        self._library = library
        self._cpu_ids = list(cpu_ids)
        self._half_ids = self._cpu_ids[len(cpu_ids) // 2 :]
        self._all = self._create(self._cpu_ids)
        self._half = 0
        self._creating = threading.Lock()
        self._calling = threading.local()

    def of_step(self, *, on_half: bool) -> int:
        """Return the address of the pool for a step, and move the calling thread.

        Args:
            on_half: The first half of the CPUs is its worker's meanwhile.
        """
        if on_half != getattr(self._calling, "is_on_half", False):
            # Where the host took the CPUs away, the thread stays.
            with suppress(OSError):
                cpu_ids = self._half_ids if on_half else self._cpu_ids
                os.sched_setaffinity(0, cpu_ids)
            self._calling.is_on_half = on_half
        return self._half_of() if on_half else self._all

    def _half_of(self) -> int:
        with self._creating:
            if not self._half:
                try:
                    self._half = self._create(self._half_ids)
                except OSError as error:
                    logger.warning("steps use all CPUs of this node: %s", error)
                    self._half = self._all
            return self._half

    def _create(self, cpu_ids: Sequence[int]) -> int:
        spin_us = _SPIN_US if len(cpu_ids) > 1 else 0
        return self._library.create_pool(len(cpu_ids), cpu_ids, spin_us)
