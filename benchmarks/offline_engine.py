# SPDX-License-Identifier: Apache-2.0
"""One engine of ``offline.py``, in a process of its own: reads points, prints times.

Requests and answers are JSON lines on stdin and on the file descriptor in argv.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

VOCABULARY = range(1000, 40000)
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Point:
    """A batch of requests, each with its own ``context`` tokens."""

    batch: int
    context: int
    steps: int
    seed: int


class Engine:
    """Stock or offloading vLLM; steps are timed one by one.

    Args:
        options: Keyword arguments of ``vllm_attn_offload.LLM``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm_attn_offload import LLM

        self._llm = LLM(**options)
        self._is_offload = bool(options.get("attention_offload"))
        self._num_requests = 0

    def check(self, num_prompts: int, num_tokens: int) -> list[list[int]]:
        """Greedy tokens of fixed prompts, to compare both engines before timing."""
        from vllm import SamplingParams, TokensPrompt

        prompts = _prompts(Point(num_prompts, 48, num_tokens, seed=0))
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def measure(self, point: Point) -> dict[str, Any]:
        """Prefill a batch, then time decode steps.

        Returns:
            ``step_s``, the median time between tokens, and where it went per layer.
        """
        names = self._add_requests(point)
        engine = self._llm.llm_engine
        started: set[str] = set()
        while len(started) < point.batch:
            started.update(output.request_id for output in engine.step())
        for _ in range(WARM_UP_STEPS):
            engine.step()
        before = self._breakdown()
        intervals = []
        last = time.perf_counter()
        for _ in range(point.steps):
            engine.step()
            now = time.perf_counter()
            intervals.append(now - last)
            last = now
        after = self._breakdown()
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "step_s": statistics.median(intervals),
            "layer_us": _per_layer_us(before, after),
        }

    def _add_requests(self, point: Point) -> list[str]:
        from vllm import SamplingParams

        # Requests that are prefilled first decode while the others are prefilled.
        params = SamplingParams(temperature=0, max_tokens=1024, ignore_eos=True)
        names = []
        for prompt in _prompts(point):
            names.append(str(self._num_requests))
            self._num_requests += 1
            self._llm.llm_engine.add_request(
                names[-1], {"prompt_token_ids": prompt}, params
            )
        return names

    def _breakdown(self) -> dict[str, float]:
        """Seconds since start by part, on the worker and on the memory node."""
        if not self._is_offload:
            return {}
        from vllm_attn_offload.client.control_client import ControlClient
        from vllm_attn_offload.engine_config import run_dir
        from vllm_attn_offload.memory_node.launcher import local_address

        (times,) = self._llm.collective_rpc("exchange_times")
        node = ControlClient(local_address(run_dir(0)), timeout_s=10)
        (session,) = node.stats().sessions
        node.close()
        return {
            "layer_calls": times["num_layer_calls"],
            "pack": times["pack_s"],
            "send": times["send_s"],
            "wait": times["wait_s"],
            "node receive": session.receive_s,
            "node store": session.store_s,
            "node attend": session.attend_s,
            "node send": session.send_s,
        }


def _prompts(point: Point) -> list[list[int]]:
    """Tokens that no two requests share: a shared prefix would sit in the cache."""
    draw = random.Random(f"{point.seed}-{point.batch}-{point.context}")
    return [draw.choices(VOCABULARY, k=point.context) for _ in range(point.batch)]


def _per_layer_us(
    before: dict[str, float], after: dict[str, float]
) -> dict[str, float]:
    if not after:
        return {}
    calls = after["layer_calls"] - before["layer_calls"]
    return {
        part: 1e6 * (after[part] - before[part]) / calls
        for part in after
        if part != "layer_calls"
    }


def main() -> None:
    """``offline_engine.py FD OPTIONS``: serve requests until stdin ends."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    engine = Engine(json.loads(sys.argv[2]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "check" in request:
            answer: Any = engine.check(*request["check"])
        else:
            answer = engine.measure(Point(**request))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
