# SPDX-License-Identifier: Apache-2.0
"""Starts the engines of ``offline.py``, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.processes import READY_FD, ManagedProcess

ENGINE_SCRIPT = Path(__file__).with_name("engine_main.py")
LOG = Path("/tmp/attn-offload-benchmark.log")
#: Prefilling the largest batch takes most of it.
ANSWER_TIMEOUT_S = 7200.0
MARGIN_TOKENS = 512


class EngineProcess(ManagedProcess):
    """An engine that answers requests, one JSON line each.

    Args:
        name: Shown in the table.
        options: Keyword arguments of ``vllm_attn_offload.LLM``.
        variables: Added to the environment.
        log: File that the engine's output is appended to.
    """

    start_timeout_s = 900.0
    stop_timeout_s = 60.0

    def __init__(
        self, name: str, options: dict[str, Any], variables: dict[str, str], log: Path
    ) -> None:
        always = {
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # Functions of these benchmarks run in the worker.
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
        super().__init__(
            name,
            [sys.executable, ENGINE_SCRIPT, READY_FD, json.dumps(options)],
            log,
            variables=always | variables,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and wait for its answer."""
        self.tell(json.dumps(request))
        return json.loads(self.read_line(ANSWER_TIMEOUT_S))

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Let the engine end with its stdin, so that it stops its nodes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.stop_timeout_s)
        return super().stop(signum)


def as_option(micro_batches: str) -> int | str:
    """A value of ``num_microbatches``."""
    return micro_batches if micro_batches == "auto" else int(micro_batches)


def offload_engine(
    arguments: argparse.Namespace,
    model: str,
    log: Path,
    name: str,
    **options: Any,
) -> EngineProcess:
    """An offloading engine, by default with a local node."""
    offload = {
        "kv_cache_gib": pool_gib(model, arguments),
        "local_node_cpus": arguments.node_cpus,
        **options,
    }
    cpus = arguments.compute_cpus
    variables = {"VLLM_CPU_OMP_THREADS_BIND": cpus} if cpus else {}
    return EngineProcess(
        f"offload {name}",
        {
            **engine_options(arguments, model),
            "attention_offload": True,
            "attention_offload_config": offload,
        },
        variables,
        log,
    )


def stock_engine(
    arguments: argparse.Namespace, model: str, log: Path, name: str, cpus: str
) -> EngineProcess:
    """Stock vLLM with a KV cache of the same size."""
    num_bytes = int(pool_gib(model, arguments) * (1 << 30))
    return EngineProcess(
        name,
        {**engine_options(arguments, model), "kv_cache_memory_bytes": num_bytes},
        {"VLLM_CPU_OMP_THREADS_BIND": cpus},
        log,
    )


def engine_options(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Options of every engine, and those that a benchmark sets as ``engine``."""
    return {
        "model": model,
        "dtype": arguments.dtype,
        "enforce_eager": not arguments.compile,
        "max_model_len": _longest(arguments),
        "max_num_seqs": max(arguments.batch),
        "max_num_batched_tokens": 2048,
        **vars(arguments).get("engine", {}),
    }


def pool_gib(model: str, arguments: argparse.Namespace) -> float:
    """KV bytes of the largest batch, with a fifth to spare."""
    config = json.loads(Path(model, "config.json").read_text("utf-8"))
    head_size = config["hidden_size"] // config["num_attention_heads"]
    item_bytes = 4 if arguments.dtype == "float32" else 2
    token_bytes = (
        2
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * head_size
        * item_bytes
    )
    num_tokens = _longest(arguments) * max(arguments.batch)
    return round(1.2 * token_bytes * num_tokens / (1 << 30) + 0.1, 2)


def _longest(arguments: argparse.Namespace) -> int:
    return max(arguments.context) + MARGIN_TOKENS
