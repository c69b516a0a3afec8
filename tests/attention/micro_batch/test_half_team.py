# SPDX-License-Identifier: Apache-2.0
"""Half of a worker's threads, beside a node on the same CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from harness import tiny_llama
from layered_model import Engine
from node_process import running_node
from thread_cpus import thread_cpus
from vllm import _custom_ops as ops
from vllm.config import CompilationMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_attn_offload.attention.micro_batch.half_team import why_undivided
from vllm_attn_offload.attention.micro_batch.sized_kernels import SizedKernels

STEPS = [[40, 3, 17, 1, 90], *[[1] * 5] * 3, [1, 1, 20, 1, 1], [1, 0, 1, 1, 0]]
SIZE, NUM_ROWS = 1024, 64


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch._C.set_num_threads(number)
    try:
        yield
    finally:
        torch._C.set_num_threads(before)


@pytest.fixture
def layer() -> torch.nn.Module:
    """A layer whose product is computed as in vLLM's CPU worker."""
    return made_layer(torch.float32)


def made_layer(dtype: torch.dtype) -> torch.nn.Module:
    made = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=dtype)
    dispatch_cpu_unquantized_gemm(made, remove_weight=False)
    return made


def test_cut_steps_compute_with_half_of_the_threads(tmp_path: Path) -> None:
    """To the results of whole steps, while the node is on the other half."""
    cpus = os.sched_getaffinity(0)
    with (
        threads(4),
        running_node(
            tmp_path,
            *("--kv-cache-gib", "0.25", "--cpus", ",".join(map(str, cpus))),
            *("--attention-kernel", "cpp"),
        ) as node,
    ):
        whole = Engine(node.address, 1, 5)
        cut = Engine(node.address, 2, 5, divides_cpus=True)
        seen = []
        pid = cut.control.info.pid
        cut.model.qkv[1].register_forward_pre_hook(
            lambda *_: seen.append((torch.get_num_threads(), free_threads(pid, cpus)))
        )
        for num_new in STEPS:
            expected, _ = whole.step(num_new)
            output, _ = cut.step(num_new)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            assert torch.get_num_threads() == 4
        on_half = [num_free for _, num_free in seen]
        assert [number for number, _ in seen] == [4, *[2] * 6, 4, 2, 2]
        is_moved = int(len(cpus) > 1)
        whole_steps = {on_half[0], on_half[7]}
        assert whole_steps == {on_half[2] + is_moved}
        assert len({on_half[index] for index in (2, 4, 6, 9)}) == 1
        assert cut.runner.times()["divides_cpus"] == 1
        assert whole.runner.times()["divides_cpus"] == 0
        for engine in (whole, cut):
            engine.close()


def free_threads(pid: int, cpus: set[int]) -> int:
    """Threads of a process that may run on all of these CPUs."""
    return list(thread_cpus(pid).values()).count(cpus)


@pytest.mark.parametrize(
    ("num_threads", "offload", "change", "reason"),
    [
        (2, {}, {}, None),
        (2, {}, {"GOMP_CPU_AFFINITY": ""}, "which thread is on which CPU"),
        (1, {}, {}, "share one CPU"),
        (2, {"num_local_nodes": 2}, {}, "several memory nodes share"),
        (2, {}, {"mode": CompilationMode.VLLM_COMPILE}, "--enforce-eager"),
        (2, {}, {"quantization": "compressed-tensors"}, "of quantized weights"),
    ],
    ids=["divided", "unbound", "one CPU", "several nodes", "compiled", "quantized"],
)
def test_steps_that_stay_whole(
    tmp_path: Path,
    num_threads: int,
    offload: dict[str, Any],
    change: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0 1")
    tiny_llama.save(tmp_path)
    options = tiny_llama.engine_options() | {"skip_tokenizer_init": True}
    config = EngineArgs(
        str(tmp_path), **options, additional_config={"attention_offload": offload}
    ).create_engine_config()
    for name, value in change.items():
        if name.isupper():
            monkeypatch.delenv(name)
            continue
        part = config.compilation_config if name == "mode" else config.model_config
        setattr(part, name, value)
    with threads(num_threads):
        found = why_undivided(config)
    assert (found is None) if reason is None else (reason in found)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_the_same(dtype: torch.dtype) -> None:
    layer, eps = made_layer(dtype), torch.finfo(dtype).eps
    linear, weight = layer.cpu_linear, layer.weight
    kernels = SizedKernels(layer)
    assert layer.cpu_linear is not linear
    for shape in ((1, SIZE), (NUM_ROWS, SIZE), (3, 5, SIZE)):
        rows = torch.randn(shape, dtype=dtype)
        exact = (rows.double() @ weight.double().T).to(dtype)
        for kernels.are_apart in (False, True):
            found = layer.cpu_linear(rows, weight, None)
            torch.testing.assert_close(found, exact, rtol=eps, atol=20 * eps)
    kernels.uninstall()
    assert layer.cpu_linear is linear


@torch.inference_mode()
def test_a_row_alone_has_a_kernel_apart(layer: torch.nn.Module) -> None:
    """Though it has no stride: the kernel is that of two rows."""
    handler, strides = ops.create_onednn_mm(layer.weight.t(), 32), []

    def linear(rows: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        strides.append(rows.reshape(-1, handler.k).stride(0))
        return ops.onednn_mm(handler, rows, rest[1])

    layer.cpu_linear = linear
    kernels = SizedKernels(layer)
    kernels.are_apart = True
    found = layer.cpu_linear(torch.ones(1, SIZE), layer.weight, None)
    assert strides[0] > SIZE
    exact = layer.weight.sum(1)[None]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_kernels_keep_their_threads(layer: torch.nn.Module) -> None:
    """Whoever computes a number of rows first, all threads or half of them."""
    kernels = SizedKernels(layer)
    for half_is_first in (False, True):
        # Numbers that no other test uses: kernels are kept for the process.
        mine = torch.randn(47 + half_is_first, SIZE)
        for is_half in (half_is_first, not half_is_first, half_is_first):
            kernels.are_apart = is_half
            with threads(1 if is_half else 2):
                layer.cpu_linear(mine, layer.weight, None)
                share = share_of_others(layer, mine)
            assert share < 0.1 if is_half else share > 0.3


def test_other_products_stay() -> None:
    """Only those are changed whose kernels vLLM keeps by their rows."""
    layer = torch.nn.Linear(SIZE, SIZE)
    layer.cpu_linear = torch.nn.functional.linear
    SizedKernels(layer)
    assert layer.cpu_linear is torch.nn.functional.linear


def share_of_others(layer: torch.nn.Module, rows: torch.Tensor) -> float:
    """CPU time of the second busiest thread in many products, by that of the first."""
    process = psutil.Process()
    before = {each.id: each.user_time for each in process.threads()}
    for _ in range(400):
        layer.cpu_linear(rows, layer.weight, None)
    spent = [each.user_time - before.get(each.id, 0.0) for each in process.threads()]
    return sorted(spent)[-2] / max(spent)
