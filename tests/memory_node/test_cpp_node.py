# SPDX-License-Identifier: Apache-2.0
"""A node that attends with the compiled kernels on all CPUs, and one without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from micro_batches import assert_micro_batches_are_exact
from node_process import NodeProcess, running_node
from paged_batch import TORCH_DTYPES, PagedBatch, max_error
from raw_session import RawSession, make_geometry, reservation

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.decode_attention.base import LayerCall
from vllm_attn_offload.memory_node.decode_attention.cpp_attention import (
    CppDecodeAttention,
)
from vllm_attn_offload.memory_node.decode_attention.cpp_threads import CppThreads
from vllm_attn_offload.memory_node.kv_cache import PagedKVCache
from vllm_attn_offload.native.attention import load_cpu_library
from vllm_attn_offload.protocol.geometry import Dtype, SessionGeometry
from vllm_attn_offload.protocol.layer import PayloadLayout, TokenLayout

ROOT = Path(__file__).parents[2]
NUM_BLOCKS = 64
# Few long requests are split over the threads, whole ones of many are not.
SPLIT = [[900], [1], [40], [1]]
MANY = [[15, 16, 17, 1, 64, 65, 130, 3], 8 * [1], [1, 0, 5, 1, 1, 0, 1, 1]]
CHOOSE_KERNEL = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
from vllm_attn_offload.memory_node.decode_attention import create_decode_attention
print("kernel:", create_decode_attention("auto", "cpu").name)
create_decode_attention("cpp", "cpu")
"""

needs_library = pytest.mark.skipif(
    load_cpu_library() is None,
    reason="the CPU kernel library is not built: no C++ compiler at install",
)


@pytest.fixture(scope="module")
def cpp_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(
        tmp_path_factory.mktemp("cpp-node"),
        *("--attention-kernel", "cpp", "--kv-cache-gib", "0.5"),
    ) as process:
        yield process


def run_alone(
    address: str, geometry: SessionGeometry, steps: list[list[int]], seed: int
) -> list[torch.Tensor]:
    """All outputs and LSEs of the steps on a session of its own."""
    batch = PagedBatch(geometry, NUM_BLOCKS, len(steps[0]), seed)
    results = []
    with closing(RawSession(address, geometry, NUM_BLOCKS)) as session:
        for num_new in steps:
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            for layer in range(len(geometry.layers)):
                results += session.attend(layer, qkv, want_lse=True)
    return [tensor for tensor in results if tensor is not None]


@needs_library
def test_start_without_torch(cpp_node: NodeProcess) -> None:
    """Importing it takes longer than all else between a loss and the next token."""
    maps = Path(f"/proc/{cpp_node.process.pid}/maps").read_text()
    assert "_native.lib.so" in maps
    # vLLM preloads the libgomp of its torch into children of a process that used it.
    assert "libtorch" not in maps


@needs_library
@pytest.mark.parametrize("steps", [SPLIT, MANY], ids=["split", "many"])
@pytest.mark.parametrize(
    ("dtype", "heads", "head_size"),
    [
        ("float32", (4, 4), 64),
        ("bfloat16", (9, 3), 64),
        ("float16", (8, 2), 96),
    ],
)
def test_cpp_attention_is_exact(
    cpp_node: NodeProcess,
    dtype: Dtype,
    heads: tuple[int, int],
    head_size: int,
    steps: list[list[int]],
) -> None:
    """On all CPUs; every slot outside the requests' own tokens holds NaN."""
    geometry = make_geometry(
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=head_size,
        dtype=dtype,
    )
    batch = PagedBatch(geometry, NUM_BLOCKS, len(steps[0]))
    item_error = torch.finfo(TORCH_DTYPES[dtype]).eps
    with closing(RawSession(cpp_node.address, geometry, NUM_BLOCKS)) as session:
        step, nans = batch.poison(NUM_BLOCKS)
        session.send_step(step)
        assert session.attend(1, nans)[0].isnan().all()
        for num_new in steps:
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            out, lse = session.attend(1, qkv, want_lse=True)
            exact, exact_lse = batch.expected(torch.float64)
            assert lse is not None
            torch.testing.assert_close(
                out.double(), exact, atol=4e-6 + item_error, rtol=item_error
            )
            assert max_error(lse, exact_lse) < 3e-6


def two_runs(address: str) -> list[partial[list[torch.Tensor]]]:
    other = make_geometry(num_query_heads=8, num_kv_heads=1, dtype="bfloat16")
    return [
        partial(run_alone, address, make_geometry(), MANY, 1),
        partial(run_alone, address, other, SPLIT, 2),
    ]


def assert_alike_together(
    runs: list[partial[list[torch.Tensor]]], alone: list[list[torch.Tensor]]
) -> None:
    with ThreadPoolExecutor(len(runs)) as pool:
        futures = [pool.submit(run) for run in runs]
        for future, expected in zip(futures, alone, strict=True):
            assert all(map(torch.equal, future.result(), expected))


@needs_library
def test_concurrent_sessions_do_not_mix(cpp_node: NodeProcess) -> None:
    runs = two_runs(cpp_node.address)
    alone = [run() for run in runs]
    for _ in range(3):
        assert_alike_together([*runs, *runs], [*alone, *alone])


@needs_library
@pytest.mark.slow
def test_two_sessions_for_a_minute(cpp_node: NodeProcess) -> None:
    runs = two_runs(cpp_node.address)
    alone = [run() for run in runs]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert_alike_together(runs, alone)


@needs_library
def test_micro_batches_keep_their_plans(cpp_node: NodeProcess) -> None:
    """Plans are reused, but never one that a micro-batch still needs."""
    assert_micro_batches_are_exact(cpp_node.address, [[20, 5], [1, 1], [1, 1], [3, 1]])


@needs_library
def test_unsupported_heads_are_refused(cpp_node: NodeProcess) -> None:
    with closing(ControlClient(cpp_node.address, 5)) as control:
        assert control.info.attention_kernel.startswith("cpp (")
        geometry = make_geometry(head_size=60)
        with pytest.raises(MemoryNodeError, match="--attention-kernel torch"):
            control.reserve(reservation(geometry, 1 << 20))
        # The connection goes on.
        control.refresh_info()


@needs_library
def test_layers_keep_no_memory() -> None:
    library = load_cpu_library()
    assert library is not None
    attention = CppDecodeAttention(library, [0])
    geometry = make_geometry(num_layers=4, dtype="bfloat16")
    cache = PagedKVCache(geometry, NUM_BLOCKS, attention)
    pools = [
        attention.bind(geometry, x, cache.region(x), cache.block_stride(x))
        for x in geometry.layers
    ]
    step, rows = PagedBatch(geometry, NUM_BLOCKS, 3).grow([20, 5, 40])
    qkv = rows.view(torch.uint8).numpy().data.cast("B")
    out = memoryview(bytearray(step.num_tokens * 9 * 64 * 2))
    lse = memoryview(bytearray(step.num_tokens * 9 * 4))
    plan = attention.plan(0, geometry, step, None)
    layout = PayloadLayout.fused(TokenLayout.of(geometry.layers[0]), step.num_tokens, 2)

    rounds = 50

    def run_layers() -> int:
        for _ in range(rounds):
            for pool in pools:
                call = LayerCall(qkv, layout, out, lse)
                attention.store(pool, plan, call, 0, call.layout.num_tokens)
                attention.attend(pool, plan, call)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    run_layers()
    before = run_layers()
    after = run_layers()
    tracemalloc.stop()
    # Python's own numbers and frames come and go: one byte a layer is no leak.
    assert after - before < rounds * len(pools)
    # What the session drops when it ends; a leftover view would raise BufferError.
    pools.clear()
    cache.close()
    with pytest.raises(ConnectionResetError):
        attention.plan(0, geometry, replace(step), None)


@pytest.fixture(scope="module")
def installed_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built where no compiler works, unpacked."""
    checkout = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("vllm_attn_offload", "triton_kernels", "patches"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index"]
    result = subprocess.run(
        [*command, "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."],
        cwd=checkout,
        env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    directory = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as archive:
        archive.extractall(directory)
    return directory


def test_install_without_compiler(installed_without_compiler: Path) -> None:
    """The node falls back to torch and says so once; asking for the kernel fails."""
    assert not list(installed_without_compiler.rglob("*.so"))
    path = [str(installed_without_compiler), sysconfig.get_path("purelib")]
    result = subprocess.run(
        [sys.executable, "-S", "-P", "-c", CHOOSE_KERNEL],
        cwd=installed_without_compiler,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "kernel: torch\n", result.stderr
    log, _, error = result.stderr.partition("Traceback")
    assert log.count("WARNING") == 1
    assert "the compiled CPU kernel is missing" in log
    assert "ValueError: the compiled CPU kernel is missing" in error


def test_threads_of_half_of_the_cpus() -> None:
    """A pool of their own, started when it is first asked for."""
    library = load_cpu_library()
    assert library is not None
    process, cpu = psutil.Process(), min(os.sched_getaffinity(0))
    with ThreadPoolExecutor(1) as caller:  # which moves
        caller.submit(int).result()
        before = process.num_threads()
        threads = CppThreads(library, [cpu] * 4)
        assert process.num_threads() == before + 3
        whole = caller.submit(threads.of_step, on_half=False).result()
        half = caller.submit(threads.of_step, on_half=True).result()
        assert half != whole
        assert process.num_threads() == before + 3 + 1
        assert caller.submit(threads.of_step, on_half=True).result() == half
    for pool in (whole, half):
        library.destroy_pool(pool)


TOO_MANY_THREADS = """
import resource
import psutil
from vllm_attn_offload.native.attention import load_cpu_library
library = load_cpu_library()
room = psutil.Process().memory_info().vms + (100 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    library.create_pool(200)
except OSError as error:
    print(psutil.Process().num_threads(), error)
"""


def test_a_host_without_room_for_threads() -> None:
    """Those that were started end again, and the process goes on."""
    output = subprocess.check_output(
        [sys.executable, "-c", TOO_MANY_THREADS],
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert "200 threads were asked for, and this host starts no more" in output
    assert output.startswith("1 ")
