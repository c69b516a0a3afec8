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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.greedy import Answer

VOCABULARY = range(1000, 40000)
WARM_UP_STEPS, MAX_QUEUED = 3, 512
#: Reading a step's tokens takes less where they are there already; no step does.
QUEUED_S = 0.5e-3


@dataclass(frozen=True)
class Point:
    """A batch of requests, each with its own ``context`` tokens.

    A smaller point's prompts begin a larger one's, so that prefix caching saves most
    of the prefill; decoding does not notice.
    """

    batch: int
    context: int
    steps: int


class Engine:
    """Stock or offloading vLLM; steps are timed one by one.

    Args:
        options: Keyword arguments of ``vllm_attn_offload.LLM``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm_attn_offload import LLM

        self._llm = LLM(**options)
        self._model: str = options["model"]
        self._is_offload = bool(options.get("attention_offload"))
        if self._is_offload:
            from engines import layer_clock

            self._llm.collective_rpc(layer_clock.start)
        self._offload_options = options.get("attention_offload_config", {})
        self._num_requests = 0
        self._step_s = 0.0

    def check(self, num_prompts: int, num_tokens: int) -> list[Answer]:
        """Greedy answers to fixed prompts, to compare engines before timing."""
        from engines.greedy import answer_of
        from vllm import SamplingParams, TokensPrompt

        prompts = _prompts(Point(num_prompts, 48, num_tokens))
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(
                temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2
            ),
            use_tqdm=False,
        )
        return [answer_of(output.outputs[0]) for output in outputs]

    def capacity(self) -> int:
        """Tokens of the KV pool that the scheduler sees."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None
        return cache.num_gpu_blocks * cache.block_size

    def measure(self, point: Point) -> dict[str, Any]:
        """Prefill a batch, then time decode steps.

        Returns:
            ``step_s``, the median time between tokens; where it went per layer, and
            sums of a step.
        """
        from engines.breakdown import per_layer_us, per_step

        names = self._prefill(point)
        before = self._breakdown()
        self._read_queued()
        intervals = self._decode(point.steps)
        after = self._breakdown()
        self._abort(names)
        spent = {part: after[part] - before[part] for part in after}
        return {
            "step_s": statistics.median(intervals),
            "layer_us": per_layer_us(spent),
            "sums": per_step(spent, intervals, point.batch),
        }

    def first_token(
        self, num_prompt: int, num_cached: int, num_new: int, seed: int
    ) -> dict[str, Any]:
        """Seconds to the first token of a cold prompt, and of one that is cached."""
        draw = random.Random(f"first-token-{seed}")
        cold, cached, new = (
            draw.choices(VOCABULARY, k=k) for k in (num_prompt, num_cached, num_new)
        )
        cold_s, cold_token = self._time_first_token(cold)
        self._time_first_token(cached)
        cached_s, cached_token = self._time_first_token(cached + new)
        return {
            "cold_s": cold_s,
            "cached_s": cached_s,
            "tokens": [cold_token, cached_token],
        }

    def repetitive(self, *options: Any) -> dict[str, Any]:
        """Answers to repetitive prompts; see ``repetitive.py``."""
        from engines import repetitive

        return repetitive.answer(self._llm, self._model, *options)

    def _time_first_token(self, prompt: list[int]) -> tuple[float, int]:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        started = time.perf_counter()
        (output,) = self._llm.generate(
            TokensPrompt(prompt_token_ids=prompt), params, use_tqdm=False
        )
        return time.perf_counter() - started, output.outputs[0].token_ids[0]

    def choose_micro_batches(self, option: int | str) -> None:
        """Split steps by another value of ``num_microbatches`` from now on."""
        from engines import mode as engine_mode

        self._llm.collective_rpc(engine_mode.choose, args=(option,))

    def trace(self, point: Point) -> list[list[Any]]:
        """Worker's events of a few decode steps; see ``timeline.py``."""
        from engines import timeline

        names = self._prefill(point)
        self._llm.collective_rpc(timeline.start_recording)
        self._decode(point.steps)
        (events,) = self._llm.collective_rpc(timeline.stop_recording)
        self._abort(names)
        return events

    def _prefill(self, point: Point) -> list[str]:
        names = self._add_requests(point)
        started: set[str] = set()
        while len(started) < point.batch:
            started.update(output.request_id for output in self._llm.llm_engine.step())
        self._step_s = statistics.median(self._decode(WARM_UP_STEPS))
        return names

    def _read_queued(self) -> None:
        """Read what the engine generated while counters were read: it comes at once."""
        for _ in range(MAX_QUEUED):
            if self._decode(1)[0] > max(self._step_s / 2, QUEUED_S):
                return

    def _decode(self, num_steps: int) -> list[float]:
        intervals = []
        last = time.perf_counter()
        for _ in range(num_steps):
            self._llm.llm_engine.step()
            now = time.perf_counter()
            intervals.append(now - last)
            last = now
        return intervals

    def _abort(self, names: list[str]) -> None:
        engine = self._llm.llm_engine
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()

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
        """Sums since start by part, on the worker and on the memory nodes."""
        if not self._is_offload:
            return {}
        from engines import layer_clock

        (times,) = self._llm.collective_rpc("exchange_times")
        (clock,) = self._llm.collective_rpc(layer_clock.read)
        counters = [self._counters(address) for address in self._addresses()]
        parts = ("plan", "receive", "queue", "store", "attend", "send", "layer", "cpu")
        return {
            "steps": times["num_steps"],
            "layer calls": times["num_layer_calls"],
            "cut steps": times["num_cut_steps"],
            "forward": times["decode_s"],
            "pack": times["pack_s"],
            "send": times["send_s"],
            "wait": times["wait_s"],
            "attention": clock["attention_s"],
            "attention cpu": clock["attention_cpu_s"],
            **{
                f"node {part}": sum(getattr(c, f"{part}_s") for c in counters)
                for part in parts
            },
            "bytes": sum(c.bytes_received + c.bytes_sent for c in counters),
            **{
                f"attended by {node}": c.num_attended_tokens
                for node, c in enumerate(counters)
            },
        }

    def _addresses(self) -> list[str]:
        from engines import mode as engine_mode

        (addresses,) = self._llm.collective_rpc(engine_mode.node_addresses)
        return addresses

    def _counters(self, address: str) -> Any:
        from vllm_attn_offload.client.control_client import ControlClient
        from vllm_attn_offload.transport.trust import Credentials

        token_file = self._offload_options.get("auth_token_file", "")
        credentials = Credentials(token_file)
        node = ControlClient(address, timeout_s=10, credentials=credentials)
        name = f"{self._llm.llm_engine.vllm_config.instance_id}-"
        sessions = [s for s in node.stats().sessions if s.engine.startswith(name)]
        node.close()
        (session,) = sessions
        return session.counters


def _prompts(point: Point) -> list[list[int]]:
    """Tokens that no two requests of a batch share: each reads KV of its own."""
    return [
        random.Random(f"request-{index}").choices(VOCABULARY, k=point.context)
        for index in range(point.batch)
    ]


def main() -> None:
    """``engine_main.py FD OPTIONS``: serve requests until stdin ends."""
    # In place of this folder: parts are imported as commands do.
    sys.path[0] = str(Path(__file__).parents[1])
    answers = os.fdopen(int(sys.argv[1]), "w")
    engine = Engine(json.loads(sys.argv[2]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if "first_token" in request:
            answer = engine.first_token(*request["first_token"])
        elif "repetitive" in request:
            answer = engine.repetitive(*request["repetitive"])
        elif "check" in request:
            answer = engine.check(*request["check"])
        elif "capacity" in request:
            answer = engine.capacity()
        elif "micro_batches" in request:
            engine.choose_micro_batches(request["micro_batches"])
            answer = None
        elif "trace" in request:
            answer = engine.trace(Point(**request["trace"]))
        else:
            answer = engine.measure(Point(**request))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
