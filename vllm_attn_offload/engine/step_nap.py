# SPDX-License-Identifier: Apache-2.0
"""Sleep of the engine's thread while its workers compute a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

_ResultT = TypeVar("_ResultT")

#: Of the shortest of so many waits, this part is slept through.
_NUM_WAITS = 4
_PART = 0.8
#: Shorter sleeps are not worth their wake-up, in seconds.
_MIN_NAP_S = 0.001
#: A step that is much shorter than those before it is answered this late at most.
_MAX_NAP_S = 0.25
#: An answer that is there so soon after the nap may have waited for it, in seconds.
_OVERSLEPT_S = 0.0002


class StepNap:
    """Sleeps through most of a wait that is about as long as the last ones were.

    vLLM's engine waits for its workers in a loop that yields its core and asks again
    (vllm/distributed/device_communicators/shm_broadcast.py, `SpinCondition`). Where
    workers and memory nodes use all cores, that takes the time of one of them.

    Not safe for concurrent callers: the thread that runs the engine's loop waits.
    """

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=_NUM_WAITS)

    def wait(self, get_response: Callable[[], _ResultT]) -> _ResultT:
        """Sleep, then get a response that takes as long as a step."""
        began = time.monotonic()
        if nap_s := self._nap_s():
            time.sleep(nap_s)
        woke = time.monotonic()
        response = get_response()
        ended = time.monotonic()
        if nap_s and ended - woke < _OVERSLEPT_S:
            # How short the step was is not known: the next ones are waited for awake.
            self._waits.clear()
        else:
            self._waits.append(ended - began)
        return response

    def _nap_s(self) -> float:
        if len(self._waits) < _NUM_WAITS:
            return 0.0
        nap_s = min(_PART * min(self._waits), _MAX_NAP_S)
        return nap_s if nap_s >= _MIN_NAP_S else 0.0
