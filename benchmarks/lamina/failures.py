# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with memory nodes in the simulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeLoss:
    """At `at_s` a memory node dies: nothing runs for `down_s` and all KV is lost.

    Unless `is_replaced`, its share of capacity and bandwidth stays lost.
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
