# SPDX-License-Identifier: Apache-2.0
"""Calls of CUDA's driver, by its own header: a stand-in checks every argument."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from vllm_attn_offload.transport.cuda_memory import CudaDevice

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a ``libcuda.so.1`` built from the prototypes of ``cuda.h``."""
    triton, compiler = importlib.util.find_spec("triton"), shutil.which("cc")
    if compiler is None or triton is None or triton.origin is None:
        pytest.skip("there is no C compiler, or no triton, which brings cuda.h")
    headers = Path(triton.origin).parent / "backends/nvidia/include"
    directory = tmp_path_factory.mktemp("driver")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-D_GNU_SOURCE", "-Wall", "-Werror"]
        + [f"-I{headers}", "-o", str(directory / "libcuda.so.1")]
        + [str(HERE / "driver_stub.c")],
        check=True,
    )
    return directory


def test_mapped_memory(driver: Path) -> None:
    """Two processes share it, it outlives either, and nothing is left behind."""
    process = subprocess.run(
        [sys.executable, str(HERE / "mapped_memory_process.py")],
        env=os.environ | {"LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.stdout == "done\n", process.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this host")
def test_memory_holds_no_data_of_others() -> None:
    """Memory that was written, and given back, is zero once it is cleared."""
    device = CudaDevice(torch.device("cuda"))
    for _ in range(4):
        with closing(device.allocate(8 << 20)) as memory:
            memory.clear()
            assert not memory.bytes.any()
            memory.bytes.fill_(0xFF)
            torch.cuda.synchronize()
