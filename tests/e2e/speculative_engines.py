# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of tiny models with speculative decoding, stock and offloaded.

Like ``families.py``: a process of its own that runs one engine after another.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import families
import psutil

NUM_TOKENS = 40
NUM_DRAFTED = 3
NGRAM = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
#: Prompts grow beyond the blocks that there are, all at once.
CROWDED = {"max_num_seqs": 6, "max_model_len": 320}
#: ``nodes`` are external ones, poisoned; 0: the engine starts its own. ``like``: the
#: case whose stock engine does the same; ``draft``: folder of the draft model;
#: ``ranks`` and ``cpus``: of the offloading engine.
CASES: dict[str, dict[str, Any]] = {
    "ngram of 15 in a small pool": {
        "model": "llama",
        "speculative": NGRAM | {"num_speculative_tokens": 15},
        "nodes": 2,
        "offload": {"partition": "heads"},
        "pool_blocks": 20,
        "num_layers": 4,
        "engine": CROWDED,
    },
    "ngram in two KV groups": {
        "model": "gemma3",
        "speculative": NGRAM,
        "nodes": 2,
        "offload": {"partition": "blocks", "num_microbatches": 2},
    },
    "draft loses its node": {
        "like": "draft on two ranks",
        "nodes": 0,
        "kill": True,
        # As many as fit all prompts: nothing but the loss preempts.
        "pool_blocks": None,
        "ranks": 1,
        "cpus": None,
    },
    "eagle": {
        "model": "llama",
        "speculative": {"method": "eagle"},
        "draft": "eagle",
        "nodes": 2,
        "offload": {"partition": "blocks", "num_microbatches": 2},
        "engine": {"max_num_batched_tokens": 16},
    },
    "eagle3": {
        "model": "llama",
        "speculative": {"method": "eagle3"},
        "draft": "eagle3",
        "nodes": 1,
    },
    "mtp": {"model": "mimo", "speculative": {"method": "mtp"}, "nodes": 1},
    "suffix": {"model": "llama", "speculative": {"method": "suffix"}, "nodes": 1},
    # The last one: its CPUs stay set.
    "draft on two ranks": {
        "model": "llama",
        "speculative": {"method": "draft_model"},
        "draft": "llama",
        "nodes": 1,
        "pool_blocks": 14,
        "num_layers": 8,
        "engine": CROWDED,
        "ranks": 2,
        "cpus": "0|1",
    },
}
#: Of heads and of MTP, which vLLM would look at in processes of their own.
DRAFT_CLASSES = ["EagleLlamaForCausalLM", "LlamaForCausalLMEagle3", "MiMoMTPModel"]


def settings(name: str) -> dict[str, Any]:
    """A case, with what it takes from the one it is like."""
    case = CASES[name]
    return CASES[case["like"]] | case if "like" in case else case


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    """Of one token to several blocks, one of which repeats itself; then cached ones."""
    first, second = families.prompts()
    return [*first, (list(range(40, 47)) * 9)[:60]], second


def main() -> None:
    """``speculative_engines.py MODELS OUTPUT [ADDRESS ...]``: stock, or with nodes."""
    models, output, *addresses = sys.argv[1:]
    cases = {name: settings(name) for name in CASES}
    if importlib.util.find_spec("arctic_inference") is None:
        del cases["suffix"]
    if not addresses:
        cases = {name: case for name, case in cases.items() if "like" not in case}
        plain = {case["model"] for case in cases.values()}
        cases |= {model: {"model": model} for model in sorted(plain)}
    results = {}
    for name, case in cases.items():
        started = time.perf_counter()
        results[name] = run(Path(models), case, addresses)
        sys.stderr.write(f"{name}: {time.perf_counter() - started:.1f} s\n")
    Path(output).write_text(json.dumps(results), "utf-8")


def run(models: Path, case: dict[str, Any], addresses: list[str]) -> dict[str, Any]:
    """Results of one engine."""
    from vllm_attn_offload import LLM

    # Of n-grams' compiler: vLLM looks for kernels in the attributes of all modules, and
    # one of this module's says that it has any attribute.
    sys.modules.pop("llvmlite.binding.ffi", None)
    load_classes(models / case["model"])
    options = families.ENGINE | case.get("engine", {}) | memory(case, addresses)
    if addresses and case.get("cpus"):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = case["cpus"]
        options["tensor_parallel_size"] = case["ranks"]
    if "speculative" in case:
        drafting = {"num_speculative_tokens": NUM_DRAFTED, **case["speculative"]}
        if "draft" in case:
            drafting["model"] = str(models / case["draft"])
        options["speculative_config"] = drafting
    llm: Any = LLM(str(models / case["model"]), **options)
    first, second = prompts()
    is_killed = bool(addresses and case.get("kill"))
    kill = partial(kill_while_drafting, llm) if is_killed else None
    outputs = families.generate(llm, first, num_tokens=NUM_TOKENS, kill=kill)
    outputs += families.generate(llm, second, num_tokens=NUM_TOKENS)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    counters = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    result = {
        "num_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "hits": metrics["vllm:prefix_cache_hits"].value,
        "preemptions": metrics["vllm:num_preemptions"].value,
        **{part: [each[part] for each in outputs] for part in outputs[0]},
    }
    if "speculative" in case:
        result |= {name: metrics[f"vllm:spec_decode_{name}"].value for name in counters}
    if is_killed:
        result["kills"] = llm.collective_rpc(num_kills)
    if addresses:
        result["times"] = llm.collective_rpc("exchange_times")
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def kill_while_drafting(llm: Any) -> None:
    """Let the engine's worker kill its node when it begins to draft."""
    llm.collective_rpc(kill_at_next_draft, args=(families.memory_node().pid,))


def kill_at_next_draft(worker: Any, node: int) -> None:
    """In a worker: kill a node right before the draft model's next forward pass."""

    def kill(*_: Any) -> None:
        hook.remove()
        psutil.Process(node).kill()
        worker.kills_while_drafting += 1

    worker.kills_while_drafting = 0
    hook = worker.model_runner.drafter.model.register_forward_pre_hook(kill)


def num_kills(worker: Any) -> int:
    """In a worker."""
    return worker.kills_while_drafting


def memory(case: dict[str, Any], addresses: list[str]) -> dict[str, Any]:
    """Options of the pool: the same bytes for stock vLLM and on nodes."""
    num_bytes = families.POOL_BYTES
    if case.get("pool_blocks"):
        # Keys and values of 32 tokens and 2 heads of 32 in fp32.
        num_bytes = case["pool_blocks"] * case["num_layers"] * 2 * 32 * 2 * 32 * 4
    if not addresses:
        return {"kv_cache_memory_bytes": num_bytes}
    num_nodes = case["nodes"]
    offload = {
        "kv_cache_gib": num_bytes / max(1, num_nodes) / (1 << 30),
        **case.get("offload", {}),
    }
    if num_nodes:
        offload["memory_nodes"] = addresses[:num_nodes]
    return {"attention_offload": True, "attention_offload_config": offload}


def load_classes(model: Path) -> None:
    """Make vLLM look at its classes here, and not in processes that take long."""
    from vllm import ModelRegistry

    families.load_class(str(model))
    for name in DRAFT_CLASSES:
        model_class = ModelRegistry.models[name].load_model_cls()
        ModelRegistry.register_model(name, model_class)


if __name__ == "__main__":
    main()
