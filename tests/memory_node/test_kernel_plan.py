# SPDX-License-Identifier: Apache-2.0
"""Plans of the Triton kernels: memory is kept from step to step and grows once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from paged_batch import PagedBatch
from raw_session import make_geometry

from vllm_attn_offload.memory_node.decode_attention.kernel_plan import KernelPlan
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata

NUM_BLOCKS = 64
CPU = torch.device("cpu")


def steps(geometry: SessionGeometry, *lengths: list[int]) -> Iterator[StepMetadata]:
    """Steps that add so many tokens to each request."""
    batch = PagedBatch(geometry, NUM_BLOCKS, len(lengths[0]))
    return (batch.grow(num_new)[0] for num_new in lengths)


def memory(plan: KernelPlan) -> list[int]:
    """Addresses of everything that the kernels of a step read and write."""
    (kernel,) = plan.by_shape.values()
    return [
        tensor.data_ptr()
        for tensor in (
            *(plan.slot_mapping, plan.block_table, kernel.counts, kernel.work),
            *(kernel.merges, kernel.partial_out, kernel.partial_lse),
        )
    ]


def test_steps_of_a_known_size_allocate_nothing() -> None:
    """Decode steps between chunks of 17 and 33 rows, too, find their memory again."""
    geometry = make_geometry()
    plan = KernelPlan(0, geometry, CPU)
    used = []
    for step in steps(geometry, [17, 33], [1, 1], [1, 1], [17, 33], [1, 1], [1, 1]):
        plan.fill(step)
        used.append(memory(plan))
    assert used[1] == used[2]
    assert used[4] == used[5]
    # The block table has grown with the contexts; the kernels' own memory has not.
    assert used[0][2:] == used[3][2:]
    assert used[1][2:] == used[4][2:]


def test_a_larger_step_gets_more_memory_and_a_smaller_one_keeps_it() -> None:
    geometry = make_geometry()
    plan = KernelPlan(0, geometry, CPU)
    sizes = []
    for step in steps(geometry, [1, 0, 0], [1, 1, 1], [1, 1, 0]):
        plan.fill(step)
        (kernel,) = plan.by_shape.values()
        sizes.append((kernel.max_num_seqs, kernel.num_seqs))
        assert plan.slot_mapping.tolist() == step.slot_mapping.tolist()
        num_reqs = kernel.num_seqs
        assert plan.block_table.tolist() == step.block_table[:num_reqs].tolist()
    assert sizes == [(1, 1), (4, 3), (4, 2)]


def test_a_plan_outlives_the_arrays_of_its_step() -> None:
    """The session overwrites them with the next micro-batch's step."""
    geometry = make_geometry()
    plan = KernelPlan(0, geometry, CPU)
    (step,) = steps(geometry, [5])
    plan.fill(step)
    expected = step.slot_mapping.tolist(), step.block_table.tolist()
    step.slot_mapping.fill(-1)
    step.block_table.fill(-1)
    assert (plan.slot_mapping.tolist(), plan.block_table.tolist()) == expected
