# SPDX-License-Identifier: Apache-2.0
"""One engine of ``gpu_suite.py``, in a process of its own.

``engine.py MODEL CONFIG OUTPUT FD``: CONFIG is a JSON file, OUTPUT becomes one. A line
on FD says that tokens are generated; after one on stdin it takes times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Generate tokens, then time what the configuration asks for."""
    model, config_path, output, ready_fd = sys.argv[1:]
    config: dict[str, Any] = json.loads(Path(config_path).read_text("utf-8"))
    # Before vLLM is imported. Only the node interprets kernels.
    os.environ.pop("TRITON_INTERPRET", None)
    # Functions of these benchmarks run in the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.update(config["environment"])
    sys.path[0] = str(Path(__file__).parents[1])
    from engines.engine_main import Engine, Point

    started = time.perf_counter()
    engine = Engine({"model": model, **config["options"]})
    result: dict[str, Any] = {
        "start_s": time.perf_counter() - started,
        "capacity_tokens": engine.capacity(),
        "tokens": _greedy(engine._llm, config["prompts"], config["num_tokens"]),
    }
    with os.fdopen(int(ready_fd), "w") as ready:
        print("generated", file=ready)
    if not sys.stdin.readline():  # who would read the results has ended
        return
    for point in config["points"]:
        measured = engine.measure(Point(**point))
        measured["tokens_per_s"] = point["batch"] / measured["step_s"]
        result.setdefault("points", []).append({**point, **measured})
    Path(output).write_text(json.dumps(result), "utf-8")


def _greedy(llm: Any, prompts: list[list[int]], num_tokens: int) -> list[Any]:
    """Per prompt: tokens, and how far each led before the second choice."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=num_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=2,
    )
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    found = []
    for answer in answers:
        (sequence,) = answer.outputs
        leads = []
        for choices in sequence.logprobs:
            best = sorted(choice.logprob for choice in choices.values())[::-1]
            leads.append(best[0] - best[1])
        found.append({"tokens": list(sequence.token_ids), "leads": leads})
    return found


if __name__ == "__main__":
    main()
