# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, extended to recompute requests after a memory node was lost."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.request import RequestStatus

from vllm_attn_offload.engine.recovery import Recovery
from vllm_attn_offload.logger import get_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

    _SchedulerBase = Scheduler
else:
    _SchedulerBase = object

logger = get_logger(__name__)


class AttentionOffloadSchedulerMixin(_SchedulerBase):
    """Drops the step in which a node was lost, and everything computed before.

    Running requests are preempted and computed again from their tokens, so that
    clients get no wrong and no repeated token, only a pause.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._recovery = Recovery.of_engine(vllm_config)
        self._recovery.on_back = self._publish_cleared
        # Ids of requests that a loss took out of the batch and that wait to be back.
        self._interrupted: set[str] = set()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan the next step, after a pending recovery has finished.

        Raises:
            MemoryNodeError: A lost node is not back in time.
        """
        if self._recovery.is_pending:
            self._drop_computed()
            self._recovery.finish()
        if self._interrupted:
            self._admit_interrupted()
        return super().schedule(throttle_prefills)

    def get_num_unfinished_requests(self) -> int:
        """Count what ``pause`` must wait for: also what a loss has interrupted."""
        count = super().get_num_unfinished_requests()
        if self._interrupted and self.pause_state == PauseState.PAUSED_NEW:
            count += len(self._interrupted_in_queue())
        return count

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        """Take a step's tokens, unless KV blocks were lost before its end.

        A step that ended before the loss was noticed is valid, and its tokens were
        drawn: dropped, a seeded request would draw the same token again, differently.
        """
        if self._recovery.is_pending and (
            model_runner_output is EMPTY_MODEL_RUNNER_OUTPUT
        ):
            # Before the base class sees the output: steps in flight become stale.
            self._drop_computed()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if (
            self._recovery.is_on_trial
            # Tokens of a step whose drafter lost a node say nothing of the next try.
            and not self._recovery.is_pending
            and _has_decoded(scheduler_output, outputs)
        ):
            self._recovery.note_progress()
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take drafts for the next step, unless all requests are computed again.

        A worker that lost a step, or a node while it drafted, has none that follow a
        request's tokens.
        """
        if not self._recovery.is_pending:
            super().update_draft_token_ids(draft_token_ids)

    def _interrupted_in_queue(self) -> list[Request]:
        return [r for r in self.waiting if r.request_id in self._interrupted]

    def _admit_interrupted(self) -> None:
        """Let them run where a pause keeps new requests out: they are not new."""
        requests = filter(None, map(self.requests.get, self._interrupted))
        self._interrupted = {
            request.request_id
            for request in requests
            if request.status == RequestStatus.PREEMPTED
        }
        if self.pause_state == PauseState.PAUSED_NEW:
            # vLLM admits from this queue in a pause, until it is empty.
            queued = self._interrupted_in_queue()
            self.waiting.remove_requests(queued)
            for request in queued:
                self.kv_holding_waiting.add_request(request)

    def _publish_cleared(self) -> None:
        """Tell subscribers of KV events at once: an idle engine takes no step."""
        with contextlib.suppress(RuntimeError):  # the engine is leaving
            self.kv_event_publisher.publish(
                KVEventBatch(ts=time.time(), events=[AllBlocksCleared()])
            )

    def _drop_computed(self) -> None:
        self._interrupted.update(request.request_id for request in self.running)
        num_tokens = sum(request.num_computed_tokens for request in self.running)
        if self.running:
            logger.warning(
                "Attention offload: %d running requests are computed again, %s tokens",
                len(self.running),
                f"{num_tokens:,}",
            )
        self._recovery.note_recomputed(num_tokens)
        self.reset_prefix_cache(reset_running_requests=True)


def _has_decoded(
    scheduler_output: SchedulerOutput, outputs: dict[int, EngineCoreOutputs]
) -> bool:
    """Tell whether the nodes attended for a token that came out.

    After a loss every request is prefilled again: that yields a token, but proves
    nothing about the step that failed.
    """
    cached = scheduler_output.scheduled_cached_reqs
    num_drafts = {
        request_id: len(drafts)
        for request_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items()
    }
    decoding = {
        request_id
        for request_id, num_computed in zip(
            cached.req_ids, cached.num_computed_tokens, strict=True
        )
        if num_computed
        and scheduler_output.num_scheduled_tokens[request_id]
        == 1 + num_drafts.get(request_id, 0)
    }
    return any(
        output.new_token_ids and output.request_id in decoding
        for each in outputs.values()
        for output in each.outputs
    )


class AttentionOffloadScheduler(AttentionOffloadSchedulerMixin, Scheduler):
    """Scheduler for synchronous scheduling, as on CPU compute nodes."""


class AsyncAttentionOffloadScheduler(AttentionOffloadSchedulerMixin, AsyncScheduler):
    """Scheduler for asynchronous scheduling, ahead of the output."""
