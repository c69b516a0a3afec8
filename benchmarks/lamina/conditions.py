# SPDX-License-Identifier: Apache-2.0
"""Conditions of a simulation: limits of the engine, and failures of nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeLoss:
    """Death of a memory node after `at_s` seconds.

    Nothing runs for `down_s` seconds and all KV is lost. Unless `is_replaced`, the
    node's share of capacity and bandwidth stays lost.
    """

    at_s: float
    down_s: float
    is_replaced: bool = True


@dataclass(frozen=True, slots=True)
class Failures:
    """Slow steps and lost nodes.

    In a step each memory node is slow with `straggler_probability`, which stretches
    attention by `straggler_factor`: a step waits for its slowest node.
    """

    straggler_probability: float = 0.0
    straggler_factor: float = 1.0
    losses: tuple[NodeLoss, ...] = ()


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """Limits of an engine as in vLLM, and failures.

    `kv_tokens` is the capacity of one engine on its `num_nodes` memory nodes,
    `max_chunk` the number of steps that may be simulated as one.
    """

    kv_tokens: int
    num_nodes: int = 1
    max_num_seqs: int = 1 << 30
    max_batched_tokens: int = 8192
    failures: Failures = Failures()
    seed: int = 0
    max_chunk: int = 1024
