# SPDX-License-Identifier: Apache-2.0
"""The load of ``serving.py``, sent by ``vllm bench serve``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from harness.serve_process import VLLM
from harness.serving_server import MeasuredServer

from vllm_attn_offload.planner.estimate.traces import read_trace

CHUNK_TOKENS = 512
BENCH_TIMEOUT_S = 3600.0


def warm_up_load(arguments: argparse.Namespace) -> list[str]:
    """A few short requests."""
    return [
        *("--dataset-name", "random", "--seed", "12345", "--num-prompts", "4"),
        *("--random-input-len", str(min(32, arguments.input_len))),
        *("--random-output-len", str(min(8, arguments.output_len))),
    ]


def random_load(arguments: argparse.Namespace, index: int, rate: float) -> list[str]:
    """Random lengths around the means; a seed per rate, so that no prompt is cached."""
    return [
        *("--dataset-name", "random", "--seed", str(index)),
        *("--num-prompts", str(arguments.num_prompts), "--request-rate", str(rate)),
        *("--random-input-len", str(arguments.input_len)),
        *("--random-output-len", str(arguments.output_len)),
        *("--random-range-ratio", "0.5"),
    ]


def trace_load(
    arguments: argparse.Namespace, index: int, rate: float, folder: Path
) -> list[str] | None:
    """The first requests of the trace, on a clock that gives `rate` on average.

    Prompts are random tokens that no two requests share; ids differ between rates.
    """
    if arguments.trace is None:
        return None
    requests = read_trace(arguments.trace)[: arguments.num_prompts]
    span_s = requests[-1].arrival_s or 1.0
    stretch = len(requests) / rate / span_s
    path = folder / f"trace-{index}.jsonl"
    next_id = index << 32
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            scale = arguments.trace_scale
            prompt = min(max(round(request.prompt * scale), 1), arguments.input_len)
            output = min(max(round(request.output * scale), 1), arguments.output_len)
            num_chunks = -(-prompt // CHUNK_TOKENS)
            row = {
                "timestamp": request.arrival_s * stretch,
                "input_length": prompt,
                "output_length": output,
                "hash_ids": list(range(next_id, next_id + num_chunks)),
            }
            next_id += num_chunks
            file.write(json.dumps(row) + "\n")
    return [
        *("--dataset-name", "timed_trace", "--dataset-path", str(path)),
        *("--num-prompts", str(len(requests))),
        *("--timed-trace-chunk-hash-size", str(CHUNK_TOKENS)),
    ]


def run_bench(server: MeasuredServer, load: list[str], folder: Path) -> dict[str, Any]:
    """Run ``vllm bench serve`` and return what it saves."""
    command = [
        *(str(VLLM), "bench", "serve", "--base-url", server.url),
        *(
            "--model",
            server.model,
            "--ignore-eos",
            "--temperature",
            "0",
            "--disable-tqdm",
        ),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"),
        *("--save-result", "--save-detailed", "--result-dir", str(folder)),
        *("--result-filename", f"{server.engine}.json", *load),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=BENCH_TIMEOUT_S,
        check=False,
        # timed_trace derives tokens from hashes of strings: both engines get the same.
        env=os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise SystemExit(f"vllm bench serve failed against {server.engine}:\n{tail}")
    return json.loads(Path(folder, f"{server.engine}.json").read_text("utf-8"))
