# SPDX-License-Identifier: Apache-2.0
"""Recurrent states in their own pool, under vLLM's scheduler, beside vLLM's pool."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from harness import tiny_llama
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_attn_offload.engine.resident_state_manager import (
    ResidentStateManager,
    register_resident_states,
)
from vllm_attn_offload.engine.state_pool import StatePool, choose_pool_size
from vllm_attn_offload.protocol.messages import GIB
from vllm_attn_offload.worker.resident_state import (
    ResidentStateSpec,
    states_per_request,
)

BLOCK_SIZE, MAX_NUM_SEQS, NUM_BLOCKS = 16, 6, 4000
MANY_STATES = 3000
#: Of a request in vLLM's align mode: the one that is read and the one that is written.
HELD = 2
ATTENTION = FullAttentionSpec(
    block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32
)
MODES = pytest.mark.parametrize("mode", ["align", "none"])
ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
ConfigOf = Callable[..., VllmConfig]


def state_spec(mode: str) -> MambaSpec:
    return MambaSpec(
        block_size=BLOCK_SIZE if mode == "align" else 256,
        shapes=((8, 8),),
        dtypes=(torch.float32,),
        page_size_padded=ATTENTION.page_size_bytes,
        mamba_cache_mode=mode,
    )


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> ConfigOf:
    """Configuration of a tiny model, as that of a hybrid model would be."""
    model = tmp_path_factory.mktemp("model")
    tiny_llama.save(model)
    init_none_hash(sha256)

    def create(mode: str, *, is_async: bool = False) -> VllmConfig:
        options = tiny_llama.engine_options() | {
            "skip_tokenizer_init": True,
            "enable_prefix_caching": mode == "align",
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": 64,
            "max_model_len": 256,
        }
        config = EngineArgs(str(model), **options).create_engine_config()
        config.scheduler_config.async_scheduling = is_async
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        config.cache_config.mamba_cache_mode = mode
        config.cache_config.mamba_block_size = state_spec(mode).block_size
        register_resident_states(config)
        return config

    return create


def scheduler_of(
    config: VllmConfig, num_states: int | None, num_blocks: int = NUM_BLOCKS
) -> Scheduler:
    """One group that attends and two with states; None: states in vLLM's own pool."""
    mode = config.cache_config.mamba_cache_mode
    spec = state_spec(mode)
    if num_states is not None:
        spec = ResidentStateSpec.of(spec, num_states, states_per_request(spec, config))
    groups = [KVCacheGroupSpec(["a"], ATTENTION)]
    groups += [KVCacheGroupSpec([name], spec) for name in ("m.0", "m.1")]
    is_async = config.scheduler_config.async_scheduling
    return (AsyncScheduler if is_async else Scheduler)(
        config,
        KVCacheConfig(num_blocks, [], groups),
        StructuredOutputManager(config),
        block_size=spec.block_size,
        hash_block_size=BLOCK_SIZE if mode == "align" else spec.block_size,
        log_stats=True,
    )


class Traffic:
    """Requests that begin alike now and then, end, and are given up at random.

    Args:
        scheduler: An asynchronous one is a step ahead of the answers.
        seed: Of everything that is drawn.
    """

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self.scheduler = scheduler
        self.num_allocations = self.num_preempted = 0
        self._draw = random.Random(seed)
        self._prefixes = [self._tokens(16 * count) for count in (2, 4, 7)]
        self._numbers = itertools.count()
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._max_in_flight = int(isinstance(scheduler, AsyncScheduler))

    def step(self) -> tuple[dict[str, int], list[int]]:
        """What was scheduled, and how much of new requests was cached."""
        waiting = len(self.scheduler.waiting) + len(self.scheduler.running)
        while waiting < 2 * MAX_NUM_SEQS and self._draw.random() < 0.5:
            self._add()
            waiting += 1
        if self.scheduler.requests and self._draw.random() < 0.05:
            name = self._draw.choice(sorted(self.scheduler.requests))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        output = self.scheduler.schedule()
        self.num_allocations += len(output.num_scheduled_tokens)
        self.num_preempted += len(output.preempted_req_ids or ())
        self._in_flight.append((output, self._answer(output)))
        while len(self._in_flight) > self._max_in_flight:
            self.scheduler.update_from_output(*self._in_flight.popleft())
        hits = [new.num_computed_tokens for new in output.scheduled_new_reqs]
        return dict(output.num_scheduled_tokens), hits

    def end(self) -> None:
        """Give up what is left."""
        names = list(self.scheduler.requests)
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        while self._in_flight:
            self.scheduler.update_from_output(*self._in_flight.popleft())

    def _tokens(self, count: int) -> list[int]:
        return self._draw.choices(range(3, 500), k=count)

    def _add(self) -> None:
        prompt = self._draw.choice(self._prefixes) if self._draw.random() < 0.6 else []
        prompt = prompt + self._tokens(self._draw.randrange(1, 80))
        params = SamplingParams(max_tokens=self._draw.randrange(1, 60), ignore_eos=True)
        params.update_from_generation_config({})
        hasher = get_request_block_hasher(
            self.scheduler.kv_cache_manager.block_pool.hash_block_size, sha256
        )
        name = str(next(self._numbers))
        request = Request(name, prompt, params, None, block_hasher=hasher)
        self.scheduler.add_request(request)

    def _answer(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Token 7 for every request whose prompt is through."""
        names = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[
                [7] if each.num_computed_tokens >= each.num_tokens else []
                for each in requests
            ],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )


def state_managers(scheduler: Scheduler) -> list[ResidentStateManager]:
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [each for each in managers if isinstance(each, ResidentStateManager)]


def assert_own_blocks(scheduler: Scheduler) -> None:
    """Every request's blocks are those of its group's pool."""
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        pool: BlockPool = manager.block_pool
        for blocks in manager.req_to_blocks.values():
            for block in blocks:
                assert pool.blocks[block.block_id] is block


@ASYNC
@MODES
def test_decides_like_stock(config_of: ConfigOf, mode: str, is_async: bool) -> None:
    """Where both pools hold everything: every step, every prefix hit."""
    config = config_of(mode, is_async=is_async)
    stock = Traffic(scheduler_of(config, None), 0)
    ours = Traffic(scheduler_of(config, MANY_STATES), 0)
    all_hits = []
    for _ in range(600):
        scheduled, hits = stock.step()
        assert ours.step() == (scheduled, hits)
        all_hits += hits
    assert any(all_hits) == (mode == "align")


@ASYNC
@MODES
@pytest.mark.parametrize("max_requests", [1, 2, MAX_NUM_SEQS])
def test_no_state_is_lost(
    config_of: ConfigOf, mode: str, is_async: bool, max_requests: int
) -> None:
    """However few there are: requests wait, all get through, and all is given back.

    The shared pool is short, too, so that requests are preempted.
    """
    config = config_of(mode, is_async=is_async)
    num_states = max_requests * states_per_request(state_spec(mode), config) + 1
    scheduler = scheduler_of(config, num_states, num_blocks=20)
    traffic = Traffic(scheduler, 1)
    while traffic.num_allocations < 2000:
        scheduled, _ = traffic.step()
        assert scheduled or is_async or not scheduler.requests
        assert len(scheduler.running) <= max_requests
        assert_own_blocks(scheduler)
    traffic.end()
    assert (traffic.num_preempted > 0) == (max_requests > 1)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 19
    for manager in state_managers(scheduler):
        assert manager.block_pool.get_num_free_blocks() == num_states - 1
    assert scheduler.reset_prefix_cache()


@ASYNC
@MODES
def test_nobody_is_preempted_for_states(
    config_of: ConfigOf, mode: str, is_async: bool
) -> None:
    """New requests leave those that run the states that they come to need."""
    config = config_of(mode, is_async=is_async)
    num_states = 2 * states_per_request(state_spec(mode), config) + 1
    traffic = Traffic(scheduler_of(config, num_states), 3)
    for _ in range(500):
        traffic.step()
    assert traffic.num_preempted == 0


def test_a_loss_resets_both_pools(config_of: ConfigOf) -> None:
    """With requests that run, whose states are computed again."""
    scheduler = scheduler_of(config_of("align"), MANY_STATES)
    traffic = Traffic(scheduler, 4)
    while not any(traffic.step()[1]):
        pass
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    pools = [manager.block_pool for manager in state_managers(scheduler)]
    assert [pool.get_num_free_blocks() for pool in pools] == [MANY_STATES - 1] * 2
    assert not any(pool.cached_block_hash_to_block for pool in pools)


def test_states_take_nothing_of_the_shared_pool(config_of: ConfigOf) -> None:
    scheduler = scheduler_of(config_of("none"), 3)
    traffic = Traffic(scheduler, 2)
    while not traffic.step()[0]:
        pass
    taken = NUM_BLOCKS - 1 - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    attending = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    assert taken == sum(map(len, attending.req_to_blocks.values())) > 0


def layers(mode: str = "align") -> list[dict[str, KVCacheSpec]]:
    """Of two ranks: one layer that attends, and three with states of 256 bytes."""
    spec = state_spec(mode)
    return [{"a": ATTENTION, "m.0": spec, "m.1": spec, "m.2": spec}] * 2


def test_as_many_states_as_requests_hold(config_of: ConfigOf) -> None:
    """With prefix caching four times as many."""
    size = choose_pool_size(config_of("none"), layers("none"), GIB, None)
    assert size == MAX_NUM_SEQS + 1
    size = choose_pool_size(config_of("align"), layers(), GIB, None)
    assert size == 4 * HELD * MAX_NUM_SEQS + 1
    # A step in flight keeps what it reads.
    size = choose_pool_size(config_of("align", is_async=True), layers(), GIB, None)
    assert size == 4 * (HELD + 1) * MAX_NUM_SEQS + 1


def test_as_many_states_as_fit(config_of: ConfigOf) -> None:
    """Half of 16 sets of 768 bytes each; or all that the user gives."""
    config = config_of("align")
    assert choose_pool_size(config, layers(), 16 * 768, None) == 8
    assert choose_pool_size(config, layers(), 16 * 768, 12 * 768 / GIB) == 12


@pytest.mark.parametrize(
    ("free", "given", "message"),
    [
        (5 * 768, None, r"Half of the compute node's .* Allowed: from 0\.0000021"),
        (2 * 768, None, "which one request takes. Free memory on the compute node"),
        (GIB, 2 * 768 / GIB, r"resident_state_gib=1\.4\d+e-06 was given.* to 1 GiB"),
        (GIB, 2.0, "resident_state_gib=2 was given.* are free. Allowed: from "),
    ],
)
def test_sizes_that_are_refused(
    config_of: ConfigOf, free: int, given: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_pool_size(config_of("align"), layers(), free, given)


def test_specs_of_all_ranks_are_replaced(config_of: ConfigOf) -> None:
    """Once and for all; those of layers that attend are not."""
    pool = StatePool(config_of("align"), list)
    first = pool.place(layers())
    for rank in first:
        assert rank["a"] is ATTENTION
        assert all(
            isinstance(rank[name], ResidentStateSpec) for name in ("m.0", "m.1", "m.2")
        )
    assert pool.place(layers()) == first


def test_models_without_states_are_left_alone(config_of: ConfigOf) -> None:
    attending: list[dict[str, KVCacheSpec]] = [{"a": ATTENTION}]
    assert StatePool(config_of("none"), list).place(attending) is attending


def test_states_within_a_prompt_are_refused_on_cpus(config_of: ConfigOf) -> None:
    """Mamba-2 layers have them, and need them with prefix caching."""
    refused, served = (
        [{"a": ATTENTION, "m": replace(spec, num_prefill_checkpoint_blocks=1)}]
        for spec in map(state_spec, ("align", "none"))
    )
    with pytest.raises(ValueError, match="Pass --no-enable-prefix-caching"):
        StatePool(config_of("align"), list).place(refused)
    assert StatePool(config_of("none"), list).place(served)
