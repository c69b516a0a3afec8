# SPDX-License-Identifier: Apache-2.0
"""The question that ``plan`` answers."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Question:
    """Does ``offload`` pay for this model and workload?

    `num_micro_batches` is the largest number to consider; without a `price_list` the
    first one with both kinds of device is used.
    """

    shape: ModelShape
    offload: Offload
    workload: Workload
    num_micro_batches: int = 2
    price_list: str | None = None
