# SPDX-License-Identifier: Apache-2.0
"""A CPU worker whose vLLM warms up with steps that look real, as 0.33's may do.

vLLM does so on CPUs with its second model runner only, which needs a Triton for CPUs.
"""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_attn_offload.worker.cpu import CpuAttentionOffloadWorker

PROMPT = list(range(100, 140))
REQUEST = "warm-up"


class _WarmsUp(CPUWorker):
    warm_up: dict[str, Any]

    def compile_or_warm_up_model(self) -> Any:
        request = Request(REQUEST, PROMPT, SamplingParams(max_tokens=2), None)
        step = SchedulerOutput.make_empty()
        step.scheduled_new_reqs = [
            NewRequestData.from_request(
                request, block_ids=([1, 2],), prefill_token_ids=PROMPT
            )
        ]
        step.num_scheduled_tokens = {REQUEST: len(PROMPT)}
        step.total_num_scheduled_tokens = len(PROMPT)
        self.execute_model(step)
        output = self.sample_tokens(None)
        done = SchedulerOutput.make_empty()
        done.finished_req_ids = {REQUEST}
        self.execute_model(done)
        self.warm_up = {"req_ids": output.req_ids} | self.exchange_times()
        return super().compile_or_warm_up_model()


class WarmingWorker(CpuAttentionOffloadWorker, _WarmsUp):
    """Ours, over a worker of vLLM that warms up."""

    def warm_up_report(self) -> dict[str, Any]:
        """Requests of the dummy step's output, and sums of times until its end."""
        return self.warm_up
