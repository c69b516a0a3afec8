# SPDX-License-Identifier: Apache-2.0
"""Greedy answers to prompts that repeat a phrase, which n-grams guess well."""

from __future__ import annotations

import time
from typing import Any

from engines.greedy import answer_of
from harness import prompts


def answer(
    llm: Any,
    model: str,
    num_prompts: int,
    num_context: int,
    num_tokens: int,
    is_checked: bool,
) -> dict[str, Any]:
    """Answer all prompts at once.

    Returns:
        ``seconds`` from the first prompt to the last token and the ``num_steps`` that
        it took; ``answers`` with their leads where ``is_checked``, which costs time.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=num_tokens,
        ignore_eos=True,
        logprobs=2 if is_checked else None,
    )
    phrases = prompts.phrases_of(model, num_prompts)
    engine, done = llm.llm_engine, {}
    num_steps, started = 0, time.perf_counter()
    for index, phrase in enumerate(phrases):
        prompt = prompts.repeated(phrase, num_context)
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        num_steps += 1
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = output.outputs[0]
    seconds = time.perf_counter() - started
    answers = [completion for _, completion in sorted(done.items())]
    return {
        "seconds": seconds,
        "num_steps": num_steps,
        "answers": [answer_of(each) for each in answers] if is_checked else [],
    }
