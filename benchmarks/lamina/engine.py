# SPDX-License-Identifier: Apache-2.0
"""One simulated engine: continuous batching over its requests.

It advances in chunks of equal steps, up to its next event (arrival, finished
request, full KV cache, node loss), so cost follows events, not tokens.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from lamina.conditions import NodeLoss, SimulationConfig
from lamina.result import EngineStats

from vllm_attn_offload.planner.estimate.cost_model import step_time
from vllm_attn_offload.planner.estimate.traces import Request


class StepModel(Protocol):
    """Seconds of one engine without contention, as EngineTimes gives them."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that a step may be cut into."""

    def decode(
        self, rows: float, context: float, num_micro_batches: int
    ) -> tuple[float, float, float]:
        """Model, attention and wire time of a micro-batch of `rows` requests."""

    def overhead(self, batch: int) -> float:
        """Part of a step that no micro-batch hides."""

    def prefill(self, tokens: float, context: float) -> float:
        """Prefill of `tokens` that attend to `context` tokens on average."""


class MemoryPool:
    """Attention demand of the engines that share one set of memory nodes.

    Requests of different engines meet at a node at random, layer by layer, so an
    engine that needs `a` seconds alone takes a / (1 - rho) with rho the others' load
    (processor sharing), and never more than waiting for everybody once per step.
    """

    def __init__(self) -> None:
        self._demand: dict[int, tuple[float, float]] = {}

    def stretch(self, engine: int, attention_s: float) -> float:
        """Attention time of `engine` under the others' present load."""
        others = [demand for e, demand in self._demand.items() if e != engine]
        bound = attention_s + sum(work for work, _ in others)
        load = sum(load for _, load in others)
        return bound if load >= 1 else min(attention_s / (1 - load), bound)

    def report(self, engine: int, attention_s: float, step_s: float) -> None:
        """Record the demand of the chunk `engine` runs now."""
        self._demand[engine] = (attention_s, attention_s / step_s if step_s else 0.0)


@dataclass(slots=True)
class _Running:
    """A request and the tokens it had generated at `since_step`."""

    index: int
    arrival_s: float
    prompt: int
    output: int
    generated: int = 0
    since_step: int = 0
    has_first_token: bool = False


class Engine:
    """One engine: FCFS admission, last-come preemption, chunks of equal steps."""

    def __init__(
        self,
        index: int,
        requests: Sequence[Request],
        model: StepModel,
        config: SimulationConfig,
        pool: MemoryPool,
    ) -> None:
        self.index, self.model, self.config, self.pool = index, model, config, pool
        self.now = requests[0].arrival_s if requests else 0.0
        self.stats = EngineStats()
        self._arrivals = deque(
            _Running(i, r.arrival_s, r.prompt, r.output) for i, r in enumerate(requests)
        )
        self._waiting: deque[_Running] = deque()
        self._running: dict[int, _Running] = {}
        self._finish: list[tuple[int, int]] = []
        self._newest: list[int] = []
        self._step = 0
        self._kv = 0
        self._nodes = config.num_nodes
        self._losses = deque(sorted(config.failures.losses, key=lambda loss: loss.at_s))
        self._rng = np.random.default_rng([config.seed, index])

    @property
    def is_done(self) -> bool:
        """Nothing left to run or to arrive."""
        return not (self._arrivals or self._waiting or self._running)

    @property
    def capacity(self) -> int:
        """KV tokens on the nodes that are left."""
        return self.config.kv_tokens * self._nodes // self.config.num_nodes

    def advance(self) -> None:
        """Run until the next event."""
        if self._losses and self.now >= self._losses[0].at_s:
            self._lose_node(self._losses.popleft())
        self._take_arrivals()
        admitted = self._admit()
        if not self._running:
            if self._arrivals:
                self.now = max(self.now, self._arrivals[0].arrival_s)
            return
        if admitted:
            self._mixed_steps(admitted)
        else:
            self._decode_steps()

    def _take_arrivals(self) -> None:
        while self._arrivals and self._arrivals[0].arrival_s <= self.now:
            self._waiting.append(self._arrivals.popleft())

    def _admit(self) -> list[int]:
        """Move in waiting requests for one step's token budget; their token counts."""
        admitted: list[int] = []
        while self._waiting and len(self._running) < self.config.max_num_seqs:
            request = self._waiting[0]
            if request.prompt + request.output > self.capacity:
                self._waiting.popleft()
                self.stats.refused += 1
                continue
            need = request.prompt + request.generated
            # One step of growth for everyone, or the newcomer is preempted at once.
            if self._kv + need + len(self._running) + 1 > self.capacity:
                break
            if admitted and sum(admitted) + need > self.config.max_batched_tokens:
                break
            self._waiting.popleft()
            self._kv += need
            request.since_step = self._step
            self._running[request.index] = request
            left = request.output - request.generated
            heapq.heappush(self._finish, (self._step + left, request.index))
            heapq.heappush(self._newest, -request.index)
            admitted.append(need)
        return admitted

    def _step_time(self, batch: int, context: float, steps: int) -> float:
        """Time of a step; micro-batches are used only where they help."""
        slower = self._straggling(steps) * self.config.num_nodes / self._nodes
        best_s, work_s = float("inf"), 0.0
        for n in sorted({1, self.model.num_micro_batches}):
            if n > batch:
                continue
            model_s, attention_s, wire_s = self.model.decode(batch / n, context, n)
            attention_s *= slower
            shared = self.pool.stretch(self.index, n * attention_s) / n
            step_s = step_time(model_s, shared, wire_s, n)
            if step_s < best_s:
                best_s, work_s = step_s, n * attention_s
        best_s += self.model.overhead(batch)
        self.pool.report(self.index, work_s, best_s)
        self.stats.memory_busy_s += work_s * steps
        return best_s

    def _straggling(self, steps: int) -> float:
        failures = self.config.failures
        p = failures.straggler_probability
        if p == 0:
            return 1.0
        slow = self._rng.binomial(steps, 1 - (1 - p) ** self._nodes)
        return float(1 + (failures.straggler_factor - 1) * slow / steps)

    def _mixed_steps(self, admitted: list[int]) -> None:
        """Prefill the admitted requests while the others decode.

        A prompt above the token budget takes several steps. Its request counts as
        decoding from the first of them, which is early by that many tokens.
        """
        tokens = sum(admitted)
        chunks = -(-tokens // self.config.max_batched_tokens)
        batch = len(self._running)
        steps = min(chunks, self._steps_to_event(), self._steps_that_fit(batch))
        step_s = self._step_time(batch, self._kv / batch, steps)
        context = sum(n * n for n in admitted) / tokens / 2
        prefill_s = self.model.prefill(tokens, context) / steps
        self._run(steps, step_s + prefill_s)

    def _decode_steps(self) -> None:
        batch = len(self._running)
        while self._kv + batch > self.capacity:
            self._preempt()
            batch = len(self._running)
        steps = min(
            self._steps_to_event(),
            self._steps_that_fit(batch),
            self.config.max_chunk,
        )
        # Times are linear in the context, so the middle of the chunk is its mean.
        context = self._kv / batch + (steps - 1) / 2
        step_s = self._step_time(batch, context, steps)
        boundary = self._next_boundary()
        if boundary is not None and self.now + steps * step_s > boundary:
            steps = max(int(-(-(boundary - self.now) // step_s)), 1)
        self._run(steps, step_s)

    def _steps_that_fit(self, batch: int) -> int:
        return (self.capacity - self._kv) // batch

    def _steps_to_event(self) -> int:
        """Steps until the next request finishes."""
        while self._finish[0][1] not in self._running or self._stale(*self._finish[0]):
            heapq.heappop(self._finish)
        return self._finish[0][0] - self._step

    def _stale(self, at_step: int, index: int) -> bool:
        """True for a heap entry from before the request was preempted."""
        r = self._running[index]
        return at_step != r.since_step + r.output - r.generated

    def _next_boundary(self) -> float | None:
        """Second at which an arrival or a node loss ends the chunk."""
        times = [self._losses[0].at_s] if self._losses else []
        if self._arrivals and not self._waiting:  # a full engine takes nobody
            times.append(self._arrivals[0].arrival_s)
        return min(times, default=None)

    def _run(self, steps: int, step_s: float) -> None:
        batch, stats = len(self._running), self.stats
        self.now += steps * step_s
        self._step += steps
        self._kv += steps * batch
        stats.generated += steps * batch
        stats.tbt.append((step_s, steps * batch))
        stats.busy_s += steps * step_s
        stats.batch_seconds += steps * step_s * batch
        stats.kv_peak_tokens = max(stats.kv_peak_tokens, self._kv)
        stats.end_s = self.now
        if self._waiting or self._arrivals:
            stats.loaded_s, stats.loaded_tokens = stats.busy_s, stats.generated
        for request in self._first_tokens():
            request.has_first_token = True
            stats.ttft_s.append(self.now - (steps - 1) * step_s - request.arrival_s)
        self._finish_requests()

    def _first_tokens(self) -> list[_Running]:
        """Requests that this chunk gave their first token: the newest, unmarked."""
        found = []
        while self._newest:
            request = self._running.get(-self._newest[0])
            if request is not None and request.has_first_token:
                break
            heapq.heappop(self._newest)
            if request is not None:
                found.append(request)
        for request in found:
            heapq.heappush(self._newest, -request.index)
        return found

    def _finish_requests(self) -> None:
        while self._finish and self._finish[0][0] <= self._step:
            at_step, index = heapq.heappop(self._finish)
            if index in self._running and not self._stale(at_step, index):
                request = self._running.pop(index)
                self._kv -= request.prompt + request.output
                self.stats.finished += 1

    def _preempt(self) -> None:
        """Evict the newest request; it is recomputed with what it has generated."""
        while -self._newest[0] not in self._running:
            heapq.heappop(self._newest)
        self._evict(self._running[-heapq.heappop(self._newest)])

    def _evict(self, request: _Running) -> None:
        del self._running[request.index]
        request.generated += self._step - request.since_step
        self._kv -= request.prompt + request.generated
        self._waiting.appendleft(request)
        self.stats.preemptions += 1

    def _lose_node(self, loss: NodeLoss) -> None:
        for index in sorted(self._running, reverse=True):
            self._evict(self._running[index])
        self._newest.clear()
        self.now += loss.down_s
        if not loss.is_replaced:
            self._nodes = max(self._nodes - 1, 1)
