# SPDX-License-Identifier: Apache-2.0
"""A pool that is too small, in a temporary directory as long as vLLM bears."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from harness import tiny_llama

pytestmark = pytest.mark.long

SCRIPT = """
import json, sys
from vllm_attn_offload import LLM
options = json.loads(sys.argv[2])
offload = {"kv_cache_gib": 0.0002}
LLM(sys.argv[1], attention_offload=True, attention_offload_config=offload, **options)
"""
#: Of a socket's path, less "/" and the UUID of vLLM's own sockets.
LONGEST_BYTES = 107 - 1 - 36


def test_pool_holds_no_request(tiny_model: str) -> None:
    """A local node starts there, and our sentence comes in place of vLLM's."""
    options = tiny_llama.engine_options() | {"skip_tokenizer_init": True}
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        directory = Path(short, "x" * (LONGEST_BYTES - len(short) - 1))
        directory.mkdir()
        engine = subprocess.run(
            [sys.executable, "-c", SCRIPT, tiny_model, json.dumps(options)],
            env=os.environ | {"TMPDIR": str(directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert not list(directory.glob("attn-offload-*"))
    assert engine.returncode != 0
    assert f"ready on unix:{directory}/attn-offload-" in engine.stdout
    assert "ValueError: One request of 256 tokens (max_model_len) must fit in the" in (
        engine.stdout
    )
    assert "Set kv_cache_gib to 0.000" in engine.stdout
    _, _, after = engine.stdout.partition("Engine core initialization failed")
    (last,) = (line for line in after.splitlines() if "ERROR" in line)
    assert "One request of 256 tokens (max_model_len) must fit in the" in last
    assert last.endswith("or add a memory node.")
    assert "gpu_memory_utilization`" not in engine.stdout
