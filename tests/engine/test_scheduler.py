# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with recovery, driven step by step without an engine."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest
import torch
from harness import tiny_llama
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    EventBatch,
    NullEventPublisher,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    DraftTokenIds,
    ModelRunnerOutput,
)
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_attn_offload.client.attachment import Attachment
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.engine_report import EngineReport
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.engine.outage_notice import OutageNotice
from vllm_attn_offload.engine.recovery import Recovery
from vllm_attn_offload.engine.scheduler import AttentionOffloadScheduler
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.metrics.engine_state import EngineState

BLOCK_SIZE = 16
LOSS = MemoryNodeError("node", "it is gone.")


class NoNodes(NodePool):
    """A pool of no nodes: all of them are back at once, and hold one block."""

    def __init__(self) -> None:
        config = AttentionOffloadConfig(memory_nodes=("unix:/nowhere",))
        super().__init__(config, "engine", [], ControlClient)
        self._nodes = []

    def _restart(self) -> None:
        pass

    def _open(self) -> list[list[Attachment]]:
        return [[Attachment("node", "session", "token", self.generation, 1)]]


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    """That of a tiny model on a CPU, which is scheduled synchronously."""
    model = tmp_path_factory.mktemp("model")
    tiny_llama.save(model)
    options = tiny_llama.engine_options() | {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    }
    config = EngineArgs(str(model), **options).create_engine_config()
    config.cache_config.num_gpu_blocks = 64
    return config


@pytest.fixture
def recovery(vllm_config: VllmConfig) -> Iterator[Recovery]:
    notice = OutageNotice(lambda outage: None, 60.0, 10.0)
    report = EngineReport(EngineState("model", 0), lambda state: None)
    recovery = Recovery(
        *(NoNodes(), lambda attachments: [None], 60.0, lambda error: None),
        *(notice, report),
    )
    recovery.register(vllm_config)
    yield recovery
    recovery.close()


@pytest.fixture
def scheduler(vllm_config: VllmConfig, recovery: Recovery) -> AttentionOffloadScheduler:
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32
    )
    return AttentionOffloadScheduler(
        vllm_config,
        KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(vllm_config),
        BLOCK_SIZE,
    )


def add(
    scheduler: AttentionOffloadScheduler,
    num_prompt_tokens: int = 5,
    request_id: str = "r",
) -> Request:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=50, ignore_eos=True)
    request = Request(request_id, list(range(num_prompt_tokens)), params, None)
    scheduler.add_request(request)
    return request


def decode(scheduler: AttentionOffloadScheduler) -> tuple[Request, SchedulerOutput]:
    """A request with its first token, 11, and the step that is to yield the next."""
    request = add(scheduler)
    step = scheduler.schedule()
    scheduler.update_from_output(step, sample(step, 11))
    return request, scheduler.schedule()


def sample(step: SchedulerOutput, *new_tokens: int) -> ModelRunnerOutput:
    ids = list(step.num_scheduled_tokens)
    assert ids
    index = {request_id: index for index, request_id in enumerate(ids)}
    return ModelRunnerOutput(ids, index, [list(new_tokens) for _ in ids])


def draft(scheduler: AttentionOffloadScheduler, *drafts: int) -> None:
    """Give drafts of the only request to the scheduler, as after every step."""
    scheduler.update_draft_token_ids(DraftTokenIds(["r"], [list(drafts)]))


def tokens(outputs: dict[int, EngineCoreOutputs]) -> list[int]:
    return [
        token
        for each in outputs.values()
        for output in each.outputs
        for token in output.new_token_ids
    ]


def test_tokens_that_were_drawn_before_the_loss_are_delivered(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    """The generator of a seeded request has moved; the step itself was whole."""
    request = add(scheduler)
    step = scheduler.schedule()
    recovery.report_loss(LOSS, 0)
    assert tokens(scheduler.update_from_output(step, sample(step, 11))) == [11]
    step = scheduler.schedule()
    assert not recovery.is_pending
    assert step.num_scheduled_tokens == {"r": 6}
    assert tokens(scheduler.update_from_output(step, sample(step, 12))) == [12]
    assert list(request.output_token_ids) == [11, 12]


def test_a_lost_step_is_dropped(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    """Nothing was drawn in it, and its request is computed again."""
    request, step = decode(scheduler)
    assert step.num_scheduled_tokens == {"r": 1}
    recovery.report_loss(LOSS, 0)
    assert tokens(scheduler.update_from_output(step, EMPTY_MODEL_RUNNER_OUTPUT)) == []
    assert scheduler.schedule().num_scheduled_tokens == {"r": 6}
    assert list(request.output_token_ids) == [11]


def test_a_pause_waits_for_what_a_loss_interrupted(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    """It runs again in the pause; what came in meanwhile does not."""
    request, step = decode(scheduler)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    add(scheduler, request_id="new")
    recovery.report_loss(LOSS, 0)
    scheduler.update_from_output(step, EMPTY_MODEL_RUNNER_OUTPUT)
    assert scheduler.get_num_unfinished_requests() == 1
    for token in range(12, 61):
        step = scheduler.schedule()
        assert list(step.num_scheduled_tokens) == ["r"]
        scheduler.update_from_output(step, sample(step, token))
    assert request.num_output_tokens == 50
    assert scheduler.get_num_unfinished_requests() == 0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert list(scheduler.schedule().num_scheduled_tokens) == ["new"]


def test_an_interrupted_request_is_aborted_in_a_pause(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    add(scheduler)
    step = scheduler.schedule()
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    recovery.report_loss(LOSS, 0)
    scheduler.update_from_output(step, EMPTY_MODEL_RUNNER_OUTPUT)
    scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert scheduler.get_num_unfinished_requests() == 0
    assert not scheduler.schedule().num_scheduled_tokens


def test_subscribers_learn_of_a_loss_at_once(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    """No request comes, so no step would tell them that nothing is cached."""
    published: queue.SimpleQueue[EventBatch] = queue.SimpleQueue()

    class Publisher(NullEventPublisher):
        def publish(self, events: EventBatch) -> None:
            published.put(events)

    scheduler.kv_event_publisher = Publisher()
    recovery.report_loss(LOSS, 0)
    batch = published.get(timeout=30)
    assert [type(event) for event in batch.events] == [AllBlocksCleared]


@pytest.mark.parametrize("drawn", [0, 1], ids=["step lost", "drafts lost"])
def test_what_a_loss_leaves_is_no_progress(
    scheduler: AttentionOffloadScheduler, recovery: Recovery, drawn: int
) -> None:
    """A prefill yields a token, and the next decode step loses the node again."""
    add(scheduler)
    for _ in range(5):
        step = scheduler.schedule()
        scheduler.update_from_output(step, sample(step, 11))
        step = scheduler.schedule()
        assert step.num_scheduled_tokens == {"r": 1}
        recovery.report_loss(LOSS)
        output = sample(step, 11) if drawn else EMPTY_MODEL_RUNNER_OUTPUT
        assert len(tokens(scheduler.update_from_output(step, output))) == drawn
    step = scheduler.schedule()
    scheduler.update_from_output(step, sample(step, 11))
    assert recovery.is_on_trial
    recovery.report_loss(LOSS)
    with pytest.raises(MemoryNodeError, match="6 times in a row without a decoded"):
        scheduler.schedule()


def test_a_decoded_token_is_progress(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    """Also one that comes of a verification, of several rows."""
    add(scheduler)
    for num_drafts in (0, 3) * 4:
        recovery.report_loss(LOSS)
        step = scheduler.schedule()
        scheduler.update_from_output(step, sample(step, 11))
        assert recovery.is_on_trial
        draft(scheduler, *range(num_drafts))
        step = scheduler.schedule()
        assert step.num_scheduled_tokens == {"r": 1 + num_drafts}
        scheduler.update_from_output(step, sample(step, 11))
        assert not recovery.is_on_trial


def verify(scheduler: AttentionOffloadScheduler) -> tuple[Request, SchedulerOutput]:
    """A request with its first token, 11, and the step that verifies two drafts."""
    request = add(scheduler)
    step = scheduler.schedule()
    scheduler.update_from_output(step, sample(step, 11))
    draft(scheduler, 12, 13)
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"r": 3}
    assert step.scheduled_spec_decode_tokens == {"r": [12, 13]}
    return request, step


def test_drafts_of_a_lost_step_are_dropped(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    """The worker still has those of the step before: they follow other tokens."""
    request, step = verify(scheduler)
    recovery.report_loss(LOSS, 0)
    assert tokens(scheduler.update_from_output(step, EMPTY_MODEL_RUNNER_OUTPUT)) == []
    draft(scheduler, 12, 13)
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"r": 6}
    assert not step.scheduled_spec_decode_tokens
    assert tokens(scheduler.update_from_output(step, sample(step, 12))) == [12]
    draft(scheduler, 13)
    assert scheduler.schedule().scheduled_spec_decode_tokens == {"r": [13]}
    assert list(request.output_token_ids) == [11, 12]


def test_verified_tokens_are_delivered_though_the_drafter_lost_its_node(
    scheduler: AttentionOffloadScheduler, recovery: Recovery
) -> None:
    """One draft was wrong; those that the drafter then made follow nothing."""
    request, step = verify(scheduler)
    recovery.report_loss(LOSS, 0)
    outputs = scheduler.update_from_output(step, sample(step, 12, 14))
    assert tokens(outputs) == [12, 14]
    draft(scheduler, 15)
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"r": 8}
    assert not step.scheduled_spec_decode_tokens
    assert tokens(scheduler.update_from_output(step, sample(step, 15))) == [15]
    assert list(request.output_token_ids) == [11, 12, 14, 15]
