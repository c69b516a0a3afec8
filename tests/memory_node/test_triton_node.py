# SPDX-License-Identifier: Apache-2.0
"""A node that attends with the Triton kernels, in the interpreter: exact results."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from micro_batches import assert_micro_batches_are_exact
from node_process import COMMAND, NodeProcess, eventually, running_node
from paged_batch import TORCH_DTYPES, PagedBatch, max_error
from raw_session import RawSession, make_geometry

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.protocol.geometry import Dtype, SessionGeometry

NUM_BLOCKS = 8
# Tokens that each of two requests adds per step. The kernel takes 16 rows at once:
# chunks of 17, 33 and 40 rows are cut, and requests cross blocks of 16.
STEPS = [[17, 1], [1, 15], [33, 2]]
CHUNK_AFTER_DECODE = [[15, 30], [1, 0], [40, 1]]


@pytest.fixture(scope="module")
def triton_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node of its own: the interpreter is chosen for a whole process."""
    with running_node(
        tmp_path_factory.mktemp("triton-node"),
        *("--device", "cpu", "--attention-kernel", "triton", "--kv-cache-gib", "1"),
    ) as process:
        yield process


def assert_exact(session: RawSession, batch: PagedBatch, num_new: list[int]) -> None:
    """One step; no worse than twice what plain torch loses in the same dtype."""
    step, qkv = batch.grow(num_new)
    session.send_step(step)
    out, lse = session.attend(1, qkv, want_lse=True)
    exact, exact_lse = batch.expected(torch.float64)
    naive, naive_lse = batch.expected(TORCH_DTYPES[session.geometry.dtype])
    assert lse is not None
    assert max_error(out, exact) <= 2 * max_error(naive, exact) + 1e-6
    assert max_error(lse, exact_lse) <= 2 * max_error(naive_lse, exact_lse) + 1e-5


@pytest.mark.parametrize(
    ("heads", "head_size", "dtype", "steps"),
    [
        ((4, 2), 64, "float32", STEPS),
        ((4, 4), 80, "bfloat16", STEPS),
        ((8, 1), 16, "float32", CHUNK_AFTER_DECODE),
    ],
    ids=["gqa2-fp32", "mha-80-bf16", "mqa8-fp32-chunk"],
)
def test_triton_attention_is_exact(
    triton_node: NodeProcess,
    heads: tuple[int, int],
    head_size: int,
    dtype: Dtype,
    steps: list[list[int]],
) -> None:
    """Every slot outside the requests' own tokens holds NaN."""
    geometry = make_geometry(
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=head_size,
        dtype=dtype,
    )
    batch = PagedBatch(geometry, NUM_BLOCKS, num_reqs=2)
    with closing(RawSession(triton_node.address, geometry, NUM_BLOCKS)) as session:
        step, nans = batch.poison(NUM_BLOCKS)
        session.send_step(step)
        session.attend(1, nans)
        for num_new in steps:
            assert_exact(session, batch, num_new)


def test_micro_batches_keep_their_plans(triton_node: NodeProcess) -> None:
    """Plans and their memory are reused, but never those of the other micro-batch."""
    assert_micro_batches_are_exact(
        triton_node.address, [[17, 1], [1, 1], [1, 1], [3, 2], [1, 1]]
    )


def decode(address: str, geometry: SessionGeometry, seed: int) -> list[torch.Tensor]:
    """Outputs of both layers over a prefill and a decode step."""
    batch = PagedBatch(geometry, NUM_BLOCKS, 2, seed)
    outs = []
    with closing(RawSession(address, geometry, NUM_BLOCKS)) as session:
        for num_new in ([18, 3], [1, 1]):
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            outs += [session.attend(layer, qkv)[0] for layer in (0, 1)]
    return outs


def test_triton_sessions_do_not_mix(triton_node: NodeProcess) -> None:
    """Sessions of one geometry at once get bit for bit what each gets alone."""
    geometry = make_geometry(num_query_heads=4, num_kv_heads=2, head_size=16)
    alone = [decode(triton_node.address, geometry, seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(
            pool.map(lambda seed: decode(triton_node.address, geometry, seed), (1, 2))
        )
    for expected, found in zip(alone, together, strict=True):
        assert all(map(torch.equal, found, expected))


def test_triton_pool_shows_no_older_data(triton_node: NodeProcess) -> None:
    """A session whose blocks were never written reads zeros, whoever was there."""
    geometry = make_geometry(num_query_heads=2, num_kv_heads=2, head_size=16)
    batch = PagedBatch(geometry, NUM_BLOCKS, 1)
    step, qkv = batch.grow([20])
    with closing(RawSession(triton_node.address, geometry, NUM_BLOCKS)) as first:
        first.send_step(step)
        assert first.attend(1, qkv)[0].abs().min() > 0
    unstored = replace(step, slot_mapping=np.full_like(step.slot_mapping, -1))
    with closing(RawSession(triton_node.address, geometry, NUM_BLOCKS)) as second:
        second.send_step(unstored)
        assert not second.attend(1, qkv)[0].any()


def test_triton_pool_is_freed(triton_node: NodeProcess) -> None:
    """A pool far larger than the interpreter could copy on every call."""
    geometry = make_geometry(num_query_heads=2, num_kv_heads=2, head_size=16)
    control = ControlClient(triton_node.address, 5)
    with closing(control):
        free_bytes = control.refresh_info().kv_bytes_free
        with closing(RawSession(triton_node.address, geometry, 100_000)) as session:
            batch = PagedBatch(geometry, 100_000, 1)
            assert_exact(session, batch, [3])
            assert control.refresh_info().kv_bytes_free < free_bytes
        assert eventually(lambda: control.refresh_info().kv_bytes_free == free_bytes)
    assert "Traceback" not in triton_node.log()


def test_absent_device_is_refused() -> None:
    node = subprocess.run(
        [COMMAND, "--device", "cuda:77"], capture_output=True, text=True, timeout=30
    )
    assert node.returncode == 1
    assert "--device cuda:77 is not on this host. Allowed here: cpu" in node.stderr
