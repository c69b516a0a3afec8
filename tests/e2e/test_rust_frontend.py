# SPDX-License-Identifier: Apache-2.0
"""vLLM's Rust front end, which shows none of our metrics: users are told where to look.

Its binary is not in vLLM's CPU wheel. A program that ends at once takes its place:
before it is started, vLLM has parsed and configured everything.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from harness.serve_process import VLLM

NODE = "10.99.99.1:7600"
WARNING = "vLLM's Rust front end answers /metrics and /health itself"


def test_users_are_told(tiny_model: str, tmp_path: Path) -> None:
    options = {"kv_cache_gib": 0.1, "memory_nodes": [NODE], "startup_timeout_s": 1}
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        process = subprocess.run(
            [
                *(VLLM, "serve", tiny_model, "--port", "0", "--attention-offload"),
                *("--attention-offload-config", json.dumps(options)),
                *("--enforce-eager", "--dtype", "float32", "--skip-tokenizer-init"),
                *("--max-model-len", "64"),
            ],
            env=os.environ
            | {
                "VLLM_USE_RUST_FRONTEND": "1",
                "VLLM_RUST_FRONTEND_PATH": "/bin/false",
                "TMPDIR": str(tmp_path),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
    text = log.read_text("utf-8", "replace")
    assert process.returncode, text
    assert text.count(WARNING) == 1, text
    (line,) = (each for each in text.splitlines() if WARNING in each)
    assert NODE in line
    assert "--metrics-listen HOST:PORT" in line
