# SPDX-License-Identifier: Apache-2.0
"""Spans of some of a worker's steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.worker.spans import Spans

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

#: One of so many steps is written.
_EVERY = 100


class StepSampler:
    """Writes where the time of one step in a hundred goes, from the first one on.

    Args:
        spans: Where to.
        rank: Of the worker.
    """

    def __init__(self, spans: Spans, rank: int) -> None:
        self._spans = spans
        self._rank = rank
        self._num_steps = 0

    @classmethod
    def of_worker(cls, vllm_config: VllmConfig, rank: int) -> StepSampler | None:
        """Return None where vLLM writes no traces."""
        spans = Spans.of_engine(vllm_config)
        return None if spans is None else cls(spans, rank)

    @contextmanager
    def around(
        self, nodes: RemoteAttention | None, scheduler_output: SchedulerOutput
    ) -> Iterator[None]:
        """Write a span of the block, if it is its turn.

        What a GPU's streams do after the block is not in its times.
        """
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if nodes is None or not num_tokens:
            yield
            return
        is_sampled = self._num_steps % _EVERY == 0
        self._num_steps += 1
        if not is_sampled:
            yield
            return
        before, began_s = nodes.times(), time.monotonic()
        yield
        after = nodes.times()
        spent = {name: after[name] - before[name] for name in after}
        attributes = {
            "rank": self._rank,
            "requests": len(scheduler_output.num_scheduled_tokens),
            "tokens": num_tokens,
            "layer_calls": int(spent["num_layer_calls"]),
            **{name: spent[name] for name in ("pack_s", "send_s", "wait_s", "merge_s")},
        }
        self._spans.write("step", began_s, time.monotonic(), attributes)
