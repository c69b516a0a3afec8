# SPDX-License-Identifier: Apache-2.0
"""Times all that a worker does for a layer's attention, waiting included."""

from __future__ import annotations

import time
from typing import Any

from vllm_attn_offload.attention.impl import AttentionOffloadImpl


def start(worker: Any) -> None:
    """Runs in the worker: sum up from now on what layers take, in about 1 us each."""
    forward = AttentionOffloadImpl.forward
    sums = worker.layer_times = {"attention_s": 0.0, "attention_cpu_s": 0.0}

    def timed(*arguments: Any, **keywords: Any) -> Any:
        cpu, wall = time.thread_time(), time.perf_counter()
        output = forward(*arguments, **keywords)
        sums["attention_s"] += time.perf_counter() - wall
        sums["attention_cpu_s"] += time.thread_time() - cpu
        return output

    setattr(AttentionOffloadImpl, forward.__name__, timed)


def read(worker: Any) -> dict[str, float]:
    """Runs in the worker: seconds since `start`, by any clock and of its own CPU."""
    times: dict[str, float] = worker.layer_times
    return dict(times)
