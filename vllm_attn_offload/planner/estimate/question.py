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

    Attributes:
        num_micro_batches: Largest number of micro-batches to consider.
        price_list: Price list of the catalogue; None: the first one that both kinds
            of device are on.
    """

    shape: ModelShape
    offload: Offload
    workload: Workload
    num_micro_batches: int = 2
    price_list: str | None = None
