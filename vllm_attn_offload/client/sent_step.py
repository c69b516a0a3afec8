# SPDX-License-Identifier: Apache-2.0
"""A step on its way to the memory nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_attn_offload.client.partial_outputs import PartialOutputs
from vllm_attn_offload.client.step_partition import StepPartition


@dataclass(slots=True)
class SentStep:
    """A step of one KV group that was sent, and how it is divided.

    ``remote_rows`` is int64 ``[num_remote_rows]``: rows of the batch that nodes attend
    for; None: all. ``is_plain``: one reply is the whole remote part. ``partials`` are
    by heads and size of a layer. ``on_half``: the node attends with half of its CPUs,
    and this worker computes on the others. ``key`` is made once, because layers ask.
    """

    number: int
    micro_batch: int
    group: int
    partition: StepPartition
    remote_rows: torch.Tensor | None
    is_plain: bool
    on_half: bool = False
    partials: dict[tuple[int, int], PartialOutputs] = field(default_factory=dict)
    key: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.key = (self.micro_batch, self.group)
