# SPDX-License-Identifier: Apache-2.0
"""What a session computes in a turn, between turns, and outside of them."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from paged_batch import PagedBatch, max_error
from raw_session import as_bytes, make_geometry

from vllm_attn_offload.memory_node.decode_attention import create_decode_attention
from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    LayerCall,
)
from vllm_attn_offload.memory_node.decode_attention.torch_attention import (
    TorchDecodeAttention,
)
from vllm_attn_offload.memory_node.decode_attention.triton_attention import (
    TritonDecodeAttention,
)
from vllm_attn_offload.memory_node.session_pool import SessionPool
from vllm_attn_offload.protocol.layer import PayloadLayout, TokenLayout
from vllm_attn_offload.protocol.session_counters import SessionCounters

GEOMETRY = make_geometry(num_layers=1)
NUM_BLOCKS = 260


class Turns(AbstractContextManager[None]):
    """Counts turns; in each of them the lock is held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.count += 1

    def __exit__(self, *exception: object) -> None:
        self.lock.release()


@pytest.fixture(params=["cpp", "torch"])
def attention(request: pytest.FixtureRequest) -> DecodeAttention[Any, Any]:
    threads = torch.get_num_threads()
    created = create_decode_attention(request.param, "cpu")
    torch.set_num_threads(threads)
    return created


@contextmanager
def opened(attention: DecodeAttention[Any, Any], turns: Turns) -> Iterator[SessionPool]:
    pool = SessionPool(GEOMETRY, NUM_BLOCKS, attention, turns, SessionCounters())
    yield pool
    pool.close(lambda: None)


def layer_of(qkv: torch.Tensor) -> tuple[LayerCall, torch.Tensor]:
    """A LAYER with these rows, and where its output comes."""
    rows = TokenLayout.of(GEOMETRY.layers[0])
    layout = PayloadLayout.fused(rows, qkv.shape[0], qkv.element_size())
    out = torch.full((qkv.shape[0], rows.out), torch.nan)
    return LayerCall(as_bytes(qkv), layout, as_bytes(out), None), out


def never() -> bool:
    return False


def test_rows_are_stored_in_turns(attention: DecodeAttention[Any, Any]) -> None:
    """2,048 rows of 3,840 bytes; what lies in between is stored, too."""
    turns = Turns()
    batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 2)
    with opened(attention, turns) as pool:
        (step, qkv), plan = batch.grow([2048, 0]), None
        plan = attention.plan(0, GEOMETRY, step, plan)
        call, _ = layer_of(qkv)
        with pytest.raises(ConnectionResetError, match="in the middle of a layer"):
            pool.compute(0, plan, call, turns_end_after(turns, 2))
        assert turns.count == 2
        turns.count = 0
        pool.compute(0, plan, call, never)
        assert turns.count >= 4
        step, qkv = batch.grow([1, 1])
        turns.count = 0
        call, out = layer_of(qkv)
        pool.compute(0, attention.plan(0, GEOMETRY, step, plan), call, never)
        exact, _ = batch.expected(torch.float64)
        assert max_error(out.view(exact.shape), exact) < 1e-5


def test_a_session_is_closed_while_rows_are_stored(
    attention: DecodeAttention[Any, Any],
) -> None:
    """As a stopping node closes them all: the next turn does not come."""
    turns = Turns()
    step, qkv = PagedBatch(GEOMETRY, NUM_BLOCKS, 1).grow([2048])
    with opened(attention, turns) as pool:
        call, _ = layer_of(qkv)

        def close() -> bool:
            pool.close(lambda: None)
            return False

        with pytest.raises(ConnectionResetError, match="the session was closed"):
            pool.compute(0, attention.plan(0, GEOMETRY, step, None), call, close)
        assert turns.count == 3  # one to store, one to close, one to see it


def turns_end_after(turns: Turns, count: int) -> Callable[[], bool]:
    return lambda: turns.count >= count


def test_a_decode_step_takes_one_turn(attention: DecodeAttention[Any, Any]) -> None:
    turns = Turns()
    batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 1)
    with opened(attention, turns) as pool:
        step, qkv = batch.grow([1])
        call, _ = layer_of(qkv)
        pool.compute(0, attention.plan(0, GEOMETRY, step, None), call, never)
        assert turns.count == 1


def test_long_contexts_in_torch_are_cut_between_tokens() -> None:
    """One row over 4,096 tokens takes more than one slice, and is exact."""
    attention = TorchDecodeAttention()
    batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 1)
    with opened(attention, Turns()) as pool:
        for num_new in (4096, 1):
            step, qkv = batch.grow([num_new])
            plan = attention.plan(0, GEOMETRY, step, None)
            call, out = layer_of(qkv)
            pool.compute(0, plan, call, never)
        num_slices = 1
        while not attention.attend(pool._pools[0], plan, call, slice_s=1e-9):
            num_slices += 1
        assert num_slices > 1
        exact, _ = batch.expected(torch.float64)
        assert max_error(out.view(exact.shape), exact) < 1e-5


def test_triton_layers_take_several_launches() -> None:
    """What one launch gives, and a turn for each."""
    results = []
    for max_scores in (1 << 29, 9 * 16 * 40):
        attention = TritonDecodeAttention(torch.device("cpu"))
        attention.max_scores = max_scores
        turns = Turns()
        batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 4)
        with opened(attention, turns) as pool:
            plan = None
            for num_new in ([70, 3, 0, 20], [1, 1, 5, 0], [33, 0, 1, 1]):
                step, qkv = batch.grow(num_new)
                plan = attention.plan(0, GEOMETRY, step, plan)
                step.block_table.fill(-1)  # its memory is used for the next one
                call, out = layer_of(qkv)
                pool.compute(0, plan, call, never)
                pool.compute(0, plan, call, never)
                results.append(out)
                exact, _ = batch.expected(torch.float64)
                assert max_error(out.view(exact.shape), exact) < 1e-5
    assert turns.count > 2 * 3
    # Not bit for bit: in the interpreter numpy multiplies, which rounds otherwise where
    # its operands lie otherwise in memory.
    for whole, cut in zip(results[:3], results[3:], strict=True):
        assert max_error(cut, whole.double()) < 1e-6


def test_triton_stores_in_ranges() -> None:
    attention = TritonDecodeAttention(torch.device("cpu"))
    batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 1)
    step, qkv = batch.grow([50])
    call, _ = layer_of(qkv)
    plan = attention.plan(0, GEOMETRY, step, None)
    pools = []
    for bounds in ([(0, 50)], [(0, 7), (7, 49), (49, 50)]):
        layer = GEOMETRY.layers[0]
        stride = attention.block_bytes(layer, 16, "float32")
        region = attention.allocate(NUM_BLOCKS * stride)
        pool = attention.bind(GEOMETRY, layer, region, stride)
        for first, last in bounds:
            attention.store(pool, plan, call, first, last)
        pools.append(pool)
    assert pools[0].key.any()
    assert torch.equal(pools[0].key, pools[1].key)
    assert torch.equal(pools[0].value, pools[1].value)


class WatchedRegion(mmap.mmap):
    """Knows if somebody computes while it is unmapped."""

    turns: Turns
    was_free: bool

    def close(self) -> None:
        self.was_free = self.turns.lock.acquire(blocking=False)
        if self.was_free:
            self.turns.lock.release()
        super().close()


class WatchedAttention(TorchDecodeAttention):
    """Allocates regions that are watched."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.regions: list[WatchedRegion] = []

    def allocate(self, num_bytes: int) -> WatchedRegion:
        region = WatchedRegion(-1, num_bytes)
        region.turns = self.turns
        self.regions.append(region)
        return region


def test_memory_is_unmapped_outside_the_turn() -> None:
    """Unmapping 256 GiB takes seconds, in which neighbours go on."""
    turns = Turns()
    attention = WatchedAttention(turns)
    with opened(attention, turns):
        pass
    assert turns.count == 1
    assert [region.was_free for region in attention.regions] == [True]
    assert all(region.closed for region in attention.regions)
