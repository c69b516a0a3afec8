# SPDX-License-Identifier: Apache-2.0
"""Recurrent states in their own pool, under vLLM's scheduler, beside vLLM's pool."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from harness import tiny_llama
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_attn_offload.engine.resident_state_manager import (
    ResidentStateManager,
    register_resident_states,
)
from vllm_attn_offload.engine.state_pool import choose_pool_size, with_resident_states
from vllm_attn_offload.protocol.messages import GIB
from vllm_attn_offload.worker.resident_state import ResidentStateSpec

BLOCK_SIZE, MAX_NUM_SEQS, NUM_BLOCKS = 16, 6, 4000
#: Of a request in vLLM's align mode: the one that is read and the one that is written.
HELD = 2
ATTENTION = FullAttentionSpec(
    block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32
)


def state_spec(mode: str) -> MambaSpec:
    return MambaSpec(
        block_size=BLOCK_SIZE if mode == "align" else 256,
        shapes=((8, 8),),
        dtypes=(torch.float32,),
        page_size_padded=ATTENTION.page_size_bytes,
        mamba_cache_mode=mode,
    )


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VllmConfig]:
    """Configuration of a tiny model, as that of a hybrid model would be."""
    model = tmp_path_factory.mktemp("model")
    tiny_llama.save(model)
    init_none_hash(sha256)

    def create(mode: str) -> VllmConfig:
        options = tiny_llama.engine_options() | {
            "skip_tokenizer_init": True,
            "enable_prefix_caching": mode == "align",
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": 64,
            "max_model_len": 256,
        }
        config = EngineArgs(str(model), **options).create_engine_config()
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        config.cache_config.mamba_cache_mode = mode
        config.cache_config.mamba_block_size = state_spec(mode).block_size
        register_resident_states(config)
        return config

    return create


def scheduler_of(
    config: VllmConfig, mode: str, num_states: int | None, num_blocks: int = NUM_BLOCKS
) -> Scheduler:
    """One group that attends and two with states; None: states in vLLM's own pool."""
    spec = state_spec(mode)
    if num_states is not None:
        spec = ResidentStateSpec.of(spec, num_states)
    groups = [KVCacheGroupSpec(["a"], ATTENTION)]
    groups += [KVCacheGroupSpec([name], spec) for name in ("m.0", "m.1")]
    return Scheduler(
        config,
        KVCacheConfig(num_blocks, [], groups),
        StructuredOutputManager(config),
        block_size=spec.block_size,
        hash_block_size=BLOCK_SIZE if mode == "align" else spec.block_size,
        log_stats=True,
    )


class Traffic:
    """Requests that begin alike now and then, end, and are given up at random."""

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self.scheduler = scheduler
        self._draw = random.Random(seed)
        self._prefixes = [self._tokens(16 * count) for count in (2, 4, 7)]
        self._numbers = itertools.count()
        self.num_allocations = self.num_preempted = 0

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
        hits = [new.num_computed_tokens for new in output.scheduled_new_reqs]
        self.scheduler.update_from_output(output, answer(output))
        return dict(output.num_scheduled_tokens), hits

    def end(self) -> None:
        """Give up what is left."""
        names = list(self.scheduler.requests)
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

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


def answer(output: SchedulerOutput) -> ModelRunnerOutput:
    """Token 7 for every request whose prompt is through."""
    names = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[7] for _ in names],
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


@pytest.mark.parametrize("mode", ["align", "none"])
def test_decides_like_stock(config_of: Callable[[str], VllmConfig], mode: str) -> None:
    """Where both pools hold everything: every step, every prefix hit."""
    config = config_of(mode)
    stock = Traffic(scheduler_of(config, mode, None), 0)
    ours = Traffic(scheduler_of(config, mode, 3000), 0)
    all_hits = []
    for _ in range(600):
        scheduled, hits = stock.step()
        assert ours.step() == (scheduled, hits)
        all_hits += hits
    assert any(all_hits) == (mode == "align")


@pytest.mark.parametrize("mode", ["align", "none"])
@pytest.mark.parametrize("num_states", [HELD + 1, 2 * HELD, MAX_NUM_SEQS * HELD + 1])
def test_no_state_is_lost(
    config_of: Callable[[str], VllmConfig], mode: str, num_states: int
) -> None:
    """However few there are: requests wait, all get through, and all is given back.

    The shared pool is short, too, so that requests are preempted.
    """
    scheduler = scheduler_of(config_of(mode), mode, num_states, num_blocks=20)
    traffic = Traffic(scheduler, 1)
    while traffic.num_allocations < 2000:
        scheduled, _ = traffic.step()
        assert scheduled or not scheduler.requests
        assert_own_blocks(scheduler)
    traffic.end()
    assert traffic.num_preempted > 0
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 19
    for manager in state_managers(scheduler):
        assert manager.block_pool.get_num_free_blocks() == num_states - 1
    assert scheduler.reset_prefix_cache()


def test_states_take_nothing_of_the_shared_pool(
    config_of: Callable[[str], VllmConfig],
) -> None:
    scheduler = scheduler_of(config_of("none"), "none", 3)
    traffic = Traffic(scheduler, 2)
    while not traffic.step()[0]:
        pass
    taken = NUM_BLOCKS - 1 - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    attending = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    assert taken == sum(map(len, attending.req_to_blocks.values())) > 0


def layers(mode: str = "align") -> list[dict[str, MambaSpec | FullAttentionSpec]]:
    """Of two ranks: one layer that attends, and three with states of 256 bytes."""
    spec = state_spec(mode)
    return [{"a": ATTENTION, "m.0": spec, "m.1": spec, "m.2": spec}] * 2


def test_as_many_states_as_requests_hold(
    config_of: Callable[[str], VllmConfig],
) -> None:
    config = config_of("align")
    assert choose_pool_size(config, layers(), GIB, None) == MAX_NUM_SEQS * HELD + 1
    config = config_of("none")
    assert choose_pool_size(config, layers("none"), GIB, None) == MAX_NUM_SEQS + 1


def test_as_many_states_as_fit(config_of: Callable[[str], VllmConfig]) -> None:
    """Half of 16 sets of 768 bytes each; or all that the user gives."""
    config = config_of("align")
    assert choose_pool_size(config, layers(), 16 * 768, None) == 8
    assert choose_pool_size(config, layers(), 16 * 768, 12 * 768 / GIB) == 12


@pytest.mark.parametrize(
    ("free", "given", "message"),
    [
        (5 * 768, None, "half of the compute node's free memory"),
        (GIB, 2 * 768 / GIB, r"resident_state_gib=1\.4\d+e-06 was given"),
        (GIB, 2.0, r"resident_state_gib=2 was given.* 1 GiB are free. Allowed"),
    ],
)
def test_sizes_that_are_refused(
    config_of: Callable[[str], VllmConfig],
    free: int,
    given: float | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_pool_size(config_of("align"), layers(), free, given)


def test_specs_of_all_ranks_are_replaced() -> None:
    """Those of layers that attend are not."""
    for rank in with_resident_states(layers(), 9):
        assert rank["a"] is ATTENTION
        assert all(
            isinstance(rank[name], ResidentStateSpec) for name in ("m.0", "m.1", "m.2")
        )
