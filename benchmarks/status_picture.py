# SPDX-License-Identifier: Apache-2.0
"""Draws what ``vllm-attn-offload status --watch`` shows of an engine under load.

``python benchmarks/status_picture.py`` serves SmolLM2-135M on four memory nodes, loads
it with streams, looks twice, and writes the second look to ``docs/status.svg``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from harness import faults, smollm2
from harness.memory_node import NodeProcess
from harness.serve_process import ServeProcess
from rich.console import Console

from vllm_attn_offload.status.look_taker import LookTaker
from vllm_attn_offload.status.tables import report_tables
from vllm_attn_offload.transport.trust import NO_CREDENTIALS

ROOT = Path(__file__).resolve().parents[1]
NUM_NODES, NUM_STREAMS = 4, 8
NUM_TOKENS, PROMPT_TOKENS = 600, 300
KV_GIB = 0.5
SECONDS = 4.0
WIDTH = 136
SHOWN_URL = "http://localhost:8000"


def main() -> None:
    """Serve, load, look, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "status.svg", metavar="SVG"
    )
    output = parser.parse_args().output
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nodes = [start_node(stack, directory, index) for index in range(NUM_NODES)]
        server = start_server(stack, directory, [node.address for node in nodes])
        prompts = [
            [1000 + stream + token for token in range(PROMPT_TOKENS)]
            for stream in range(NUM_STREAMS)
        ]
        load = faults.Streams(server.url, server.model, prompts, NUM_TOKENS)
        if not load.wait_for(NUM_STREAMS * 4, 240.0):
            raise SystemExit(f"no tokens came: {load.errors}")
        taker = LookTaker([], server.url, NO_CREDENTIALS, 10.0)
        taker.look(has_rates=True)
        time.sleep(SECONDS)
        report = taker.look(has_rates=True)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(report_tables(report))
    title = f"vllm-attn-offload status --engine {SHOWN_URL} --watch"
    output.parent.mkdir(parents=True, exist_ok=True)
    # Without fonts of other hosts, which README viewers do not load.
    picture = re.sub(
        r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.S
    )
    output.write_text(picture, "utf-8")
    print(f"wrote {output}")


def start_node(stack: ExitStack, directory: Path, index: int) -> NodeProcess:
    """A node that shares a CPU with the others."""
    node = NodeProcess(
        "127.0.0.1:0",
        directory / f"node-{index}.log",
        *("--name", f"memory-nodes-{index}", "--kv-cache-gib", str(KV_GIB)),
        *("--cpus", str(max(os.sched_getaffinity(0)))),
    )
    stack.callback(node.kill)
    return node


def start_server(
    stack: ExitStack, directory: Path, addresses: list[str]
) -> ServeProcess:
    """vLLM on the other CPU, with most of the nodes' memory."""
    config = {"memory_nodes": addresses, "kv_cache_gib": KV_GIB * 0.75}
    server = ServeProcess(
        str(smollm2.prepare()),
        directory / "serve.log",
        *("--attention-offload", "--attention-offload-config", json.dumps(config)),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"),
        *("--served-model-name", "SmolLM2-135M-Instruct"),
        VLLM_CPU_OMP_THREADS_BIND=str(min(os.sched_getaffinity(0))),
    )
    stack.callback(server.kill_all)
    server.model = "SmolLM2-135M-Instruct"
    return server


if __name__ == "__main__":
    main()
