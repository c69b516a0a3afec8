# SPDX-License-Identifier: Apache-2.0
"""``/metrics`` of two API servers before one engine, whichever of them answers."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from harness import faults, tiny_llama
from harness.serve_process import ServeProcess

NUM_TOKENS = 8
#: Each is answered by either server.
NUM_SCRAPES = 12

pytestmark = pytest.mark.long


def values(text: str) -> dict[str, float]:
    """Sums by metric, without the label sets."""
    sums: dict[str, float] = {}
    for name, value in re.findall(
        r"^((?:attn_offload|vllm):\w+)\{.*\} (\S+)$", text, re.M
    ):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def test_both_show_the_same_numbers(tiny_model: str, tmp_path: Path) -> None:
    server = ServeProcess(
        tiny_model,
        tmp_path / "serve.log",
        *("--attention-offload", "--attention-offload-config"),
        json.dumps({"kv_cache_gib": 0.25}),
        *("--api-server-count", "2", "--enforce-eager", "--dtype", "float32"),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--skip-tokenizer-init"),
    )
    try:
        prompts = tiny_llama.PROMPTS[:2]
        faults.Streams(server.url, server.model, prompts, NUM_TOKENS).finish(240.0)
        shown = [values(server.metrics()) for _ in range(NUM_SCRAPES)]
        for each in shown:
            assert each["attn_offload:memory_node_up"] == 1
            assert each["attn_offload:bytes_sent_total"] > 0
            assert each["attn_offload:steps_total"] >= NUM_TOKENS
            assert each["attn_offload:memory_node_kv_blocks"] > 0
            assert each["vllm:generation_tokens_total"] == len(prompts) * NUM_TOKENS
        totals = [each["attn_offload:bytes_sent_total"] for each in shown]
        assert totals == totals[:1] * NUM_SCRAPES
        assert server.end(signal.SIGINT) == []
    finally:
        server.kill_all()
