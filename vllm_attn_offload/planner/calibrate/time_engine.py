# SPDX-License-Identifier: Apache-2.0
"""Child process of ``calibrate``: times decode steps of the real engine, prints JSON.

The planner itself never imports vLLM. Attention runs on memory nodes, so that what is
left of a step is the non-attention part.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm_attn_offload.worker.base import AttentionOffloadWorker as _WorkerBase
else:
    _WorkerBase = object

WARM_UP_STEPS, WINDOW_STEPS, MIN_WINDOWS, MAX_WINDOWS = 3, 4, 2, 18
#: Times that every batch is measured, with the others in between.
NUM_ROUNDS = 2
CONTEXT = 16
MAX_TOKENS = 2 * WINDOW_STEPS * MAX_WINDOWS
# By name: this module is __main__ here and another one in the worker.
EXTENSION = "vllm_attn_offload.planner.calibrate.time_engine.LayerTimer"
EXCHANGE_PARTS = ("pack", "send", "wait", "merge")


class LayerTimer(_WorkerBase):
    """Extension of vLLM's worker (``worker_extension_cls``): time within layers."""

    def time_layers(self) -> None:
        """From now on, sum the time from the first layer's start to the last's end."""
        model: torch.nn.Module = self.model_runner.get_model()
        count = self.model_config.get_num_layers(self.parallel_config)
        layers = next(
            module
            for module in model.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count
        )
        self._layers_s, self._layers_began, self._num_steps = 0.0, 0.0, 0
        layers[0].register_forward_pre_hook(self._begin)
        layers[-1].register_forward_hook(self._end)

    def timed(self) -> tuple[int, float, float]:
        """Steps so far, seconds within their layers, and in exchanges of these."""
        times = self.exchange_times()
        exchange_s = sum(times[f"{part}_s"] for part in EXCHANGE_PARTS)
        return self._num_steps, self._layers_s, exchange_s

    def _begin(self, *_: Any) -> None:
        self._layers_began = self._now()

    def _end(self, *_: Any) -> None:
        self._layers_s += self._now() - self._layers_began
        self._num_steps += 1

    def _now(self) -> float:
        if self.device is not None and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


class TimedEngine:
    """The engine with hooks around its layers.

    Args:
        options: Keyword arguments of ``vllm_attn_offload.LLM``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm_attn_offload import LLM

        self._llm = LLM(**options, worker_extension_cls=EXTENSION)
        self._llm.collective_rpc("time_layers")
        self._num_requests = 0

    def warm_up(self, batch: int, seconds: float) -> None:
        """Run steps whose times do not count: an engine's first seconds are slower."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.measure(batch, end - time.perf_counter())

    def measure(self, batch: int, budget_s: float) -> dict[str, float]:
        """Seconds of a step, its layers and their exchanges; tokens of a request."""
        names = self._add_requests(batch)
        engine = self._llm.llm_engine
        started: set[str] = set()
        while len(started) < batch:
            started.update(output.request_id for output in engine.step())
        for _ in range(WARM_UP_STEPS):
            engine.step()
        windows: list[tuple[float, float]] = []
        steps: list[float] = []
        end = time.perf_counter() + budget_s
        while len(windows) < MIN_WINDOWS or (
            len(windows) < MAX_WINDOWS and time.perf_counter() < end
        ):
            steps += self._run_window(windows)
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        layers, exchanges = zip(*windows, strict=True)
        return {
            "step_s": statistics.median(steps),
            "layers_s": statistics.median(layers),
            "exchange_s": statistics.median(exchanges),
            "context": CONTEXT + WARM_UP_STEPS + len(windows) * WINDOW_STEPS / 2,
        }

    def _run_window(self, windows: list[tuple[float, float]]) -> list[float]:
        """Times of single steps; appends mean seconds in layers and exchanges.

        The engine runs ahead of us, so the worker counts the steps of a window.
        """
        num_before, *before = self._llm.collective_rpc("timed")[0]
        intervals = []
        for _ in range(WINDOW_STEPS):
            began = time.perf_counter()
            self._llm.llm_engine.step()
            intervals.append(time.perf_counter() - began)
        num_after, *after = self._llm.collective_rpc("timed")[0]
        layers_s, exchange_s = (
            (b - a) / (num_after - num_before)
            for a, b in zip(before, after, strict=True)
        )
        windows.append((layers_s, exchange_s))
        return intervals[1:]  # the first one contains the call

    def _add_requests(self, batch: int) -> list[str]:
        from vllm import SamplingParams, TokensPrompt

        draw = random.Random(batch)
        vocabulary = range(self._llm.llm_engine.model_config.get_vocab_size())
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        names = []
        for _ in range(batch):
            names.append(str(self._num_requests))
            self._num_requests += 1
            tokens = draw.choices(vocabulary, k=CONTEXT)
            prompt = TokensPrompt(prompt_token_ids=tokens)
            self._llm.llm_engine.add_request(names[-1], prompt, params)
        return names


def main() -> None:
    """``time_engine FD REQUEST``: measure all batches, write one JSON line to FD."""
    request = json.loads(sys.argv[2])
    engine = TimedEngine(request["options"])
    batches = request["batches"]
    engine.warm_up(max(batches), request["warm_up_s"])
    rounds = [
        [engine.measure(batch, request["seconds_per_batch"]) for batch in batches]
        for _ in range(NUM_ROUNDS)
    ]
    found = [
        [batch, {part: statistics.mean(t[part] for t in times) for part in times[0]}]
        for batch, times in zip(batches, zip(*rounds, strict=True), strict=True)
    ]
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
