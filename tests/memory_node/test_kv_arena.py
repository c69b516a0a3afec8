# SPDX-License-Identifier: Apache-2.0
"""Memory for KV blocks that a node takes at start (``--preallocate``)."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from node_process import COMMAND, NodeProcess, eventually, running_node
from paged_batch import PagedBatch
from raw_session import RawSession, make_geometry

from vllm_attn_offload.memory_node.decode_attention.torch_attention import (
    TorchDecodeAttention,
)
from vllm_attn_offload.memory_node.kv_arena import KVArena
from vllm_attn_offload.memory_node.kv_cache import PagedKVCache, bytes_per_block

MIB = 1 << 20
NUM_BLOCKS = 64


def take(arena: KVArena, num_bytes: int) -> memoryview:
    region = arena.allocate(num_bytes)
    assert region is not None
    assert len(region) == num_bytes
    assert not any(region)
    return region


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_holes_are_used_again() -> None:
    """In any order of giving back, neighbours become one hole."""
    arena = KVArena(4096)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (0, 2, 1, 3)):
        regions = [take(arena, 1024) for _ in range(4)]
        assert arena.allocate(1) is None
        for index in order:
            regions[index][:] = b"x" * 1024
            arena.free(regions[index])
        whole = take(arena, 4096)
        arena.free(whole)


def test_pieces_are_not_one_hole() -> None:
    arena = KVArena(3 * 1024)
    first, second, third = (take(arena, 1000) for _ in range(3))
    arena.free(first)
    arena.free(third)
    assert arena.allocate(2000) is None
    arena.free(second)
    take(arena, 3 * 1024)


def test_many_threads() -> None:
    """What each writes nobody else changes."""
    arena = KVArena(1 << 16)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(300):
            if (region := arena.allocate(choose.randrange(1, 9000))) is not None:
                assert not any(region)
                region[:] = bytes([seed]) * len(region)
                assert bytes(region) == bytes([seed]) * len(region)
                arena.free(region)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(1, 9)))
    take(arena, 1 << 16)


def test_touch_takes_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    arena, before = KVArena(64 * MIB), resident_bytes()
    assert resident_bytes() - before < 8 * MIB
    with caplog.at_level(logging.INFO):
        arena.touch(threading.Event(), report_s=0)
    assert resident_bytes() - before > 56 * MIB
    assert "touched 64.00 MiB of 64.00 MiB" in caplog.text


def test_touch_gives_up_when_told(caplog: pytest.LogCaptureFixture) -> None:
    arena, before, stop = KVArena(64 * MIB), resident_bytes(), threading.Event()
    stop.set()
    with caplog.at_level(logging.INFO):
        arena.touch(stop, report_s=0)
    assert resident_bytes() - before < 8 * MIB
    assert not caplog.text


def test_cache_of_a_session_lies_in_the_arena() -> None:
    """Or beside it, where no hole is long enough; what comes next is zero."""
    geometry, attention = make_geometry(num_layers=2), TorchDecodeAttention()
    num_bytes = NUM_BLOCKS * bytes_per_block(geometry, attention)
    attention.arena = arena = KVArena(num_bytes)
    inside = PagedKVCache(geometry, NUM_BLOCKS, attention)
    beside = PagedKVCache(geometry, NUM_BLOCKS, attention)
    assert inside.num_bytes == beside.num_bytes == num_bytes
    kinds = [type(x.region(geometry.layers[0])) for x in (inside, beside)]
    assert kinds[0] is memoryview
    assert kinds[1] is not memoryview
    for layer in geometry.layers:
        attention.poison(inside.region(layer))
        assert bytes(memoryview(inside.region(layer))[-3:]) == b"\xff" * 3
    inside.close()
    inside.close()
    beside.close()
    take(arena, num_bytes)


@pytest.mark.parametrize("kernel", ["cpp", "torch"])
def test_sessions_need_no_more_memory(tmp_path: Path, kernel: str) -> None:
    """They attend as always, one after the other in the memory of the first."""
    options = ("--attention-kernel", kernel, "--kv-cache-gib", "0.1", "--preallocate")
    geometry = make_geometry(num_layers=2)
    with running_node(tmp_path, *options) as node:
        process = psutil.Process(node.process.pid)
        assert process.memory_info().rss > 0.09 * (1 << 30)
        lines = node.log().splitlines()
        assert "touched 0.10 GiB" in lines[0]
        assert "ready on" in lines[1]
        for seed in range(3):
            batch = PagedBatch(geometry, NUM_BLOCKS, 3, seed)
            with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
                step, qkv = batch.grow([20, 5, 40])
                session.send_step(step)
                out, _ = session.attend(1, qkv)
                expected, _ = batch.expected(torch.float64)
                torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
            assert eventually(lambda: "released" in node.log())
        assert "in pieces" not in node.log()


def test_locks_or_says_why_not(tmp_path: Path) -> None:
    """Without the right to lock much it goes on, and names the limit."""
    prefix = ("prlimit", "--memlock=65536:65536")
    if os.geteuid() == 0:
        prefix += ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")
    node = NodeProcess(
        f"unix:{tmp_path}/node.sock",
        tmp_path / "node.log",
        *("--kv-cache-gib", "0.05", "--preallocate"),
        prefix=prefix,
    )
    try:
        assert locked_bytes(node) == 0
        assert "touched 51.20 MiB, but RLIMIT_MEMLOCK=64.00 KiB does not" in node.log()
        assert "Raise it (ulimit -l, or LimitMEMLOCK of systemd)" in node.log()
    finally:
        node.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="locking much memory needs root")
def test_locks_where_it_may(tmp_path: Path) -> None:
    options = ("--kv-cache-gib", "0.05", "--preallocate")
    with running_node(tmp_path, *options) as node:
        assert locked_bytes(node) >= 51 * MIB
        assert "touched 51.20 MiB and locked them in memory" in node.log()


def locked_bytes(node: NodeProcess) -> int:
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    match = re.search(r"VmLck:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) << 10


def test_sigterm_while_it_touches(tmp_path: Path) -> None:
    """It ends like any node, whether it was ready already or not."""
    address = f"unix:{tmp_path}/node.sock"
    with subprocess.Popen(
        [COMMAND, "--listen", address, "--kv-cache-gib", "0.5", "--preallocate"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        # The socket is there before the memory is.
        assert eventually(Path(f"{tmp_path}/node.sock").exists, 60)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert log.splitlines()[-1].endswith("stopping")
    assert "Traceback" not in log
    assert not Path(f"{tmp_path}/node.sock").exists()


def test_gpu_takes_memory_later() -> None:
    ended = subprocess.run(
        [COMMAND, "--device", "cuda:0", "--preallocate"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "--preallocate was given with --device cuda:0. Allowed: it with" in (
        ended.stderr
    )
