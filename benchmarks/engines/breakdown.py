# SPDX-License-Identifier: Apache-2.0
"""Where the time of decode steps went, from counters of the worker and its nodes."""

from __future__ import annotations

import statistics


def per_layer_us(spent: dict[str, float]) -> dict[str, float]:
    """Time of a layer by part, both micro-batches together.

    On the worker "python" is what attention takes beside packing, sending and waiting;
    of a cut step it holds the other half's turn. On a node it is what a layer takes
    beside receiving, queueing, storing, attending and sending. "overhead" is CPU time
    of both sides' threads without storing and attending, spins included.
    """
    if not spent:
        return {}
    num_calls = _num_steps(spent) * spent["layer calls"] / spent["steps"]
    us = {part: 1e6 * value / num_calls for part, value in spent.items()}
    worker = {part: us[part] for part in ("pack", "send", "wait")}
    inner = ("receive", "queue", "store", "attend", "send")
    node = {f"node {part}": us[f"node {part}"] for part in ("plan", *inner)}
    cpu_us = us["attention cpu"], us["node cpu"]
    kernel_us = us["node store"] + us["node attend"]
    return {
        **worker,
        "python": us["attention"] - sum(worker.values()),
        "cpu": cpu_us[0],
        **node,
        "node python": us["node layer"] - sum(us[f"node {part}"] for part in inner),
        "node cpu": cpu_us[1],
        "overhead": sum(cpu_us) - kernel_us,
    }


def _num_steps(spent: dict[str, float]) -> float:
    """Steps that counters are of: the engine may be ahead of who reads its tokens.

    Of a model with one KV group; a cut step is sent twice.
    """
    return spent["steps"] - spent["cut steps"]


def per_step(
    spent: dict[str, float], intervals: list[float], batch: int
) -> dict[str, float]:
    """Milliseconds of an average step: who was busy, who was idle."""
    if not spent:
        return {}
    num_steps = _num_steps(spent)
    step = 1e3 * sum(intervals) / len(intervals)
    ms = {part: 1e3 * value / num_steps for part, value in spent.items()}
    node = ms["node receive"] + ms["node store"] + ms["node attend"] + ms["node send"]
    num_layers = spent["layer calls"] / spent["steps"]
    attended = [value for part, value in spent.items() if part.startswith("attended")]
    return {
        "step": step,
        "compute busy": step - ms["wait"],
        # Not timed on GPUs, unless steps are cut.
        **({"of it forward": ms["forward"] - ms["wait"]} if ms["forward"] else {}),
        "compute idle": ms["wait"],
        "node busy": node,
        "node idle": step - node,
        "wire": ms["send"] + ms["node receive"] + ms["node send"],
        "cut share": spent["cut steps"] / num_steps,
        "layers": num_layers,
        "bytes per row and layer": spent["bytes"] / (num_steps * batch * num_layers),
        "busiest node": max(attended) / statistics.mean(attended),
    }
