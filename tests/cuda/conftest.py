# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA build on a host without a GPU, with a stub in place of the driver.

``tests/cuda/install DIR`` makes the environment next to the one that runs the tests;
``ATTN_OFFLOAD_CUDA_PYTHON=DIR/bin/python`` names it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LIBRARIES = {"libcuda.so.1": (), "libnvidia-ml.so.1": ("-DSTUB_NVML",)}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``probe.py`` found."""
    python = os.environ.get("ATTN_OFFLOAD_CUDA_PYTHON")
    if python is None:
        pytest.skip("ATTN_OFFLOAD_CUDA_PYTHON names no Python with vLLM's CUDA build")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler for the driver's stub")
    directory = tmp_path_factory.mktemp("cuda")
    for name, options in LIBRARIES.items():
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-Wall", "-Werror", *options]
            + ["-o", str(directory / name), str(HERE / "driver_stub.c")],
            check=True,
        )
    (directory / "config.json").write_text(json.dumps(MODEL), "utf-8")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(directory),
        # torch then asks NVML for GPUs and not CUDA.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    probe = subprocess.run(
        [python, str(HERE / "probe.py"), str(directory)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=directory,
        timeout=900,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr[-3000:]
    return json.loads(probe.stdout.splitlines()[-1])
