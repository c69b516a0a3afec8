# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CUDA build makes of attention offloading; no kernel runs."""

from __future__ import annotations

from typing import Any

import pytest


def test_modules_import(found: dict[str, Any]) -> None:
    """All of ours beside both model runners, on a Hopper GPU that only NVML shows."""
    assert found["imports"] == {"platform": "NvmlCudaPlatform", "flash_attention": 3}
    assert found["model_runners"] == [
        "vllm.v1.worker.gpu_model_runner",
        "vllm.v1.worker.gpu.model_runner",
    ]


def test_hooks(found: dict[str, Any]) -> None:
    """All signatures are those of the table of this release."""
    assert found["changed_hooks"] == []


def test_engine_configuration(found: dict[str, Any]) -> None:
    """Compiled, with graphs between the attention layers, scheduled asynchronously."""
    package = "vllm_attn_offload"
    assert found["configuration"] == {
        "worker": ["GpuAttentionOffloadWorker", "AttentionOffloadWorker", "Worker"],
        "abstract": [],
        "executor": f"{package}.engine.executor.AttentionOffloadExecutor",
        "scheduler": f"{package}.engine.scheduler.AsyncAttentionOffloadScheduler",
        "is_async": True,
        "backend": "AttentionOffloadBackend",
        "impl": "AttentionOffloadImpl",
        "compile": "VLLM_COMPILE",
        "splits_at_attention": True,
        "cudagraphs": "PIECEWISE",
        "eager_cudagraphs": "NONE",
    }


def test_executor_on_ray(found: dict[str, Any]) -> None:
    """Sent as a reference; the worker compares with the name of vLLM's executor."""
    assert found["ray_executor"] == {
        "executor": [
            "RayAttentionOffloadExecutor",
            "AttentionOffloadExecutorMixin",
            "_RayWorkers",
            "RayExecutorV2",
        ],
        "is_async": True,
        "is_same_when_sent": True,
        "worker_knows": "ray",
    }


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("fp32", "['dtype not supported']"),
        ("head_size", "['head_size not supported']"),
        ("mla", "['MLA not supported']"),
        ("encoder", "['attention type encoder_only not supported']"),
        ("full_graphs", "does not support cudagraph_mode=FULL"),
        ("no_split", "does not support splitting_ops without"),
        ("fused_quant", "does not support the compilation pass fuse_attn_quant"),
        ("other_backend", "which needs AttentionBackendEnum.CUSTOM"),
        ("other_worker", "worker.gpu.GpuAttentionOffloadWorker. Drop one"),
        ("cut_with_lora", "but LoRA on a GPU assigns adapters to the rows of whole"),
    ],
)
def test_refusal_says_why(found: dict[str, Any], given: str, reason: str) -> None:
    assert reason in found["refusals"][given]


@pytest.mark.parametrize(
    "given", ["sinks", "sliding_window", "cut_with_graphs", "cut_as_measured"]
)
def test_is_not_refused(found: dict[str, Any], given: str) -> None:
    assert found["refusals"][given] == ""


def test_arguments_of_kernels(found: dict[str, Any]) -> None:
    """They fit the operators' schemas: only the device is missing."""
    for name, operator in (
        ("attend", "_vllm_fa3_C::fwd"),
        ("merge", "_C::merge_attn_states"),
    ):
        assert f"Could not run '{operator}'" in found["kernels"][name]


def test_node_of_a_host_with_one_gpu(found: dict[str, Any]) -> None:
    """The only GPU computes, so the node holds the KV cache in the host's memory."""
    assert found["local_devices"] == ["cpu"]
