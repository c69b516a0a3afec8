# SPDX-License-Identifier: Apache-2.0
"""A STEP that a session has planned and whose layers may come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.protocol.step import StepMetadata


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step that layers refer to.

    Attributes:
        number: Number of the step, as its layers name it.
        num_tokens: Rows of k and v in every layer that stores.
        num_query_rows: Rows of q in every layer.
        num_attended_tokens: Tokens that a layer without a window reads.
        plan: Plan of the node's kernel.
        layouts: Layouts of LAYER payloads, kept because layers are alike.
    """

    number: int
    num_tokens: int
    num_query_rows: int
    num_attended_tokens: int
    plan: Any
    layouts: dict[tuple[int, int], PayloadLayout] = field(default_factory=dict)

    @classmethod
    def of(
        cls, number: int, step: StepMetadata, plan: Any, block_size: int
    ) -> PlannedStep:
        """Plan of a step, whose arrays may change afterwards."""
        starts = step.query_start_loc
        has_queries = starts[1:] > starts[:-1]
        return cls(
            number,
            step.num_tokens,
            step.num_query_rows,
            int(step.tokens_held(block_size) @ has_queries),
            plan,
        )
