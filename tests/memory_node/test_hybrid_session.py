# SPDX-License-Identifier: Apache-2.0
"""Sessions whose layers have windows, share KV and storages, and differ in blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from node_process import NodeProcess, eventually, running_node
from paged_batch import PagedBatch, max_error
from raw_session import RawSession, make_hybrid_geometry

from vllm_attn_offload.native.attention import load_cpu_library
from vllm_attn_offload.protocol.frames import FrameFlag, FrameKind
from vllm_attn_offload.protocol.geometry import Dtype, LayerGeometry

NUM_BLOCKS = 64
WINDOW = 40
#: Tokens that each of two requests adds per step: more than three windows.
STEPS = [[30, 5], [1, 90], [64, 1], [1, 1], [1, 1], [40, 17], *8 * [[1, 1]], [33, 2]]


@pytest.fixture(scope="module", params=["cpp", "torch"])
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    if request.param == "cpp" and load_cpu_library() is None:
        pytest.skip("the CPU kernel library is not built: no C++ compiler at install")
    with running_node(
        tmp_path_factory.mktemp("node"),
        *("--attention-kernel", request.param, "--kv-cache-gib", "0.25"),
        *("--cpus", str(max(os.sched_getaffinity(0)))),
    ) as process:
        yield process


class HybridBatch:
    """The requests of a hybrid session: each group has its own tokens and blocks.

    Args:
        session: Open, with the hybrid geometry.
    """

    def __init__(self, session: RawSession) -> None:
        self.session, self.layers = session, session.geometry.layers
        # As vLLM's one block pool: an id belongs to one group at a time.
        full, windowed = range(0, NUM_BLOCKS, 2), range(1, NUM_BLOCKS, 2)
        self.batches = [
            PagedBatch(session.geometry, NUM_BLOCKS, 2, blocks=list(full)[1:]),
            PagedBatch(
                session.geometry,
                NUM_BLOCKS,
                2,
                group=1,
                window=WINDOW,
                blocks=list(windowed),
            ),
        ]

    def poison(self, blocks: list[int]) -> None:
        """Store NaN as the full layers do, whose blocks are the larger ones."""
        full = self.batches[0]
        full.freed = blocks
        step, key, value = full.poison_freed()
        full.freed = []
        if blocks:
            self.session.send_step(step)
            for layer in (0, 1):
                self.session.post_planar(layer, (key, value))

    def step(self, num_new: list[int]) -> list[float]:
        """Largest errors of outputs and log-sum-exps, after freed blocks turned NaN."""
        # As another request would that got them: one of the other group.
        self.poison(self.batches[1].freed)
        self.batches[1].freed = []
        grown = [batch.grow(num_new) for batch in self.batches]
        for group, (step, _) in enumerate(grown):
            self.session.send_step(step, group)
        errors = []
        for index, layer in enumerate(self.layers):
            rows = grown[layer.group][1]
            out, lse = self._attend(index, layer, rows)
            exact, exact_lse = self.batches[layer.group].expected(torch.float64, layer)
            errors += [max_error(out, exact), max_error(lse, exact_lse)]
        return errors

    def _attend(
        self, index: int, layer: LayerGeometry, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer.stores:
            out, lse = self.session.attend(index, rows, want_lse=True)
        else:
            query = rows[:, : layer.num_query_heads * layer.head_size]
            flags = FrameFlag.WANT_LSE.value
            self.session.post_planar(index, (query,), flags)
            out, lse = self.session.receive_out(index, len(query), want_lse=True)
        assert lse is not None
        return out, lse


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_share_storages(node: NodeProcess, dtype: Dtype) -> None:
    """Freed blocks and the null block hold NaN, and no layer writes into another's."""
    with closing(
        RawSession(node.address, make_hybrid_geometry(dtype), NUM_BLOCKS)
    ) as session:
        batch = HybridBatch(session)
        batch.poison(list(range(NUM_BLOCKS)))
        most = 3e-5 if dtype == "float32" else 2e-2
        for num_new in STEPS:
            assert max(batch.step(num_new)) < most
        blocks = session.control.stats().sessions[0]
        # Larger blocks decide: 2 KV heads of 64 by 16 tokens, in two storages.
        item_bytes = getattr(torch, dtype).itemsize
        assert blocks.kv_bytes == NUM_BLOCKS * 2 * (2 * 2 * 64 * 16 * item_bytes)


def test_a_layer_that_stores_nothing_sends_only_q(node: NodeProcess) -> None:
    geometry = make_hybrid_geometry()
    for rows, flags, message in (
        (torch.zeros(1, (6 + 2 + 2) * 64), FrameFlag.FUSED, b"which sends only q"),
        (torch.zeros(1, (6 + 2 + 2) * 64), FrameFlag.NONE, b"need 1,536"),
    ):
        with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
            step, _ = PagedBatch(geometry, NUM_BLOCKS, 1).grow([1])
            session.send_step(step)
            session.post_planar(2, (rows,), flags.value)
            kind, payload = session.receive()
            assert kind == FrameKind.ERROR
            assert message in payload


def test_attended_tokens_count_what_tables_hold(node: NodeProcess) -> None:
    """Not the tokens behind a window, whose blocks are gone."""
    geometry = make_hybrid_geometry()
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        batch = HybridBatch(session)
        for num_new in ([300, 0], [1, 0]):
            batch.step(num_new)
        held = 301 - (301 - WINDOW) // 32 * 32
        expected = 5 * 300 + 3 * 301 + 2 * held

        def attended() -> int:
            counters = session.control.stats().sessions[0].counters
            return counters.num_attended_tokens

        # They are counted once the reply is sent.
        assert eventually(lambda: attended() == expected), attended()
