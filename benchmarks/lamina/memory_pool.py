# SPDX-License-Identifier: Apache-2.0
"""Contention of several engines for one set of memory nodes."""

from __future__ import annotations


class MemoryPool:
    """Attention demand of the engines that share one set of memory nodes.

    Requests of different engines meet at a node at random, layer by layer, so an
    engine that needs `a` seconds alone takes a / (1 - rho) with rho the others' load
    (processor sharing), and never more than waiting for everybody once per step.
    """

    def __init__(self) -> None:
        self._demand: dict[int, tuple[float, float]] = {}
        self._load = 0.0
        self._work = 0.0

    def stretch(self, engine: int, attention_s: float) -> float:
        """Attention time of `engine` under the others' present load."""
        work, load = self._demand.get(engine, (0.0, 0.0))
        others = self._load - load
        bound = attention_s + self._work - work
        if others >= 1:
            return bound
        return min(attention_s / (1 - others), bound)

    def report(self, engine: int, attention_s: float, step_s: float) -> None:
        """Record the demand of the chunk `engine` runs now."""
        work, load = self._demand.get(engine, (0.0, 0.0))
        new = (attention_s, attention_s / step_s if step_s else 0.0)
        self._demand[engine] = new
        self._work += new[0] - work
        self._load += new[1] - load
