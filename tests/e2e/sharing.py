# SPDX-License-Identifier: Apache-2.0
"""Requests that read blocks which others write in the same step."""

from __future__ import annotations

from typing import Any

import workload

NUM_PROMPTS, NUM_TOKENS = 8, 10
#: A block and a few tokens, so that every prompt finds the first one's block.
PREFIX_TOKENS = workload.BLOCK_TOKENS + 5


def arrive_together(llm: Any, phrases: list[list[int]], rounds: int) -> list[Any]:
    """Greedy tokens of prompts with one prefix; the cache is empty in every round."""
    prefix = workload.repeated(phrases[0], PREFIX_TOKENS)
    prompts = [prefix + phrases[index] for index in range(NUM_PROMPTS)]
    results = []
    for _ in range(rounds):
        assert llm.reset_prefix_cache()
        results.append(_generate(llm, prompts))
    return results


def join_writer(llm: Any, phrases: list[list[int]]) -> dict[str, Any]:
    """A prompt that is cached up to its last token by the very step that it joins.

    Returns:
        ``tokens`` of all requests, and how many decode steps ``joined`` in one, of
        which how many were cut. Steps are counted where the engine runs in this
        process.
    """
    size = workload.BLOCK_TOKENS - 8
    writer = workload.repeated(phrases[1], size)
    (written,) = _generate(llm, [writer])
    assert llm.reset_prefix_cache()
    engine = llm.llm_engine
    tokens: dict[str, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)

    for name, prompt in (("writer", writer), ("other", phrases[2] * 2)):
        engine.add_request(name, {"prompt_token_ids": prompt}, _params())
    for _ in range(8):
        step()
    reader = writer + written[:9]
    engine.add_request("reader", {"prompt_token_ids": reader}, _params())
    before = _steps(llm)
    step()
    joined = [after - past for after, past in zip(_steps(llm), before, strict=True)]
    while engine.has_unfinished_requests():
        step()
    return {"tokens": tokens, "joined": joined}


def _generate(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], _params(), use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def _params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def _steps(llm: Any) -> list[float]:
    if llm.llm_engine.vllm_config.additional_config.get("attention_offload") is None:
        return []
    (times,) = llm.collective_rpc("exchange_times")
    return [times["num_decode_steps"], times["num_cut_steps"]]
