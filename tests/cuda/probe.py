# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CUDA build makes of attention offloading, as JSON; no GPU is needed.

``probe.py MODEL``: a directory with a ``config.json``.
"""

from __future__ import annotations

import importlib
import json
import pickle
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.executor.abstract import Executor

import vllm_attn_offload
from vllm_attn_offload.attention.cuda.metadata import CudaStep
from vllm_attn_offload.attention.cuda.prefill import RemotePart
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.micro_batch.wrap_model import wrap_model
from vllm_attn_offload.engine.placement import local_devices
from vllm_attn_offload.hooks.hook_table import HookTable
from vllm_attn_offload.plugin import register

OFFLOAD = {"attention_offload": {}}


def engine_config(model: str, **options: Any) -> Any:
    """A finished ``VllmConfig`` of an engine that offloads."""
    options = {"additional_config": OFFLOAD, "dtype": "bfloat16"} | options
    arguments = EngineArgs(model, skip_tokenizer_init=True, **options)
    return arguments.create_engine_config()


def message_of(call: Callable[[], object]) -> str:
    """Of the ``ValueError``, or "" where there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def imports() -> dict[str, Any]:
    """All modules, those that need CUDA as well."""
    package = vllm_attn_offload
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.startswith("vllm_attn_offload.planner"):
            importlib.import_module(module.name)
    from vllm_attn_offload.attention.cuda.prefill import FlashPrefill

    return {
        "platform": type(current_platform).__name__,
        "flash_attention": FlashPrefill().version(128, LayerAttention(1.0)),
    }


def configuration(model: str) -> dict[str, Any]:
    """Classes and modes of an engine, as compiled and as eager."""
    config = engine_config(model)
    with set_current_vllm_config(config):
        backend = get_attn_backend(64, torch.bfloat16, None)
        torch.set_default_dtype(torch.bfloat16)
        layer = Attention(8, 64, 0.125, num_kv_heads=2, prefix="layers.0.attn")
        torch.set_default_dtype(torch.float32)
    builder = backend.get_builder_cls()
    compilation = config.compilation_config
    mode = compilation.resolve_cudagraph_mode_and_sizes(
        builder.get_cudagraph_support(config, None), backend.get_name()
    )
    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    eager = engine_config(model, enforce_eager=True)
    return {
        "worker": [each.__name__ for each in worker.__mro__[:3]],
        "abstract": sorted(getattr(worker, "__abstractmethods__", ())),
        "executor": config.parallel_config.distributed_executor_backend,
        "scheduler": config.scheduler_config.scheduler_cls,
        "backend": backend.__name__,
        "impl": type(layer.impl).__name__,
        "is_async": config.scheduler_config.async_scheduling,
        "cudagraphs": mode.name,
        "eager_cudagraphs": eager.compilation_config.cudagraph_mode.name,
        "compile": compilation.mode.name,
        "splits_at_attention": "vllm::unified_attention_with_output"
        in compilation.splitting_ops,
    }


def refusals(model: str) -> dict[str, str]:
    """What vLLM's selector, and our own checks, say to what is not supported."""
    config = engine_config(model)

    def select(head_size: int = 64, dtype: Any = torch.bfloat16, **needs: Any) -> str:
        with set_current_vllm_config(config):
            return message_of(lambda: get_attn_backend(head_size, dtype, None, **needs))

    def compiled(**options: Any) -> str:
        return message_of(lambda: engine_config(model, compilation_config=options))

    def cut(option: int | str, **options: Any) -> str:
        offload = {"attention_offload": {"num_microbatches": option}}
        cut_config = engine_config(model, additional_config=offload, **options)
        return message_of(lambda: wrap_model(torch.nn.Module(), cut_config))

    return {
        "fp32": select(dtype=torch.float32),
        "head_size": select(head_size=60),
        "sinks": select(has_sink=True),
        "sliding_window": select(has_sliding_window=True),
        "mla": select(use_mla=True),
        "encoder": select(attn_type="encoder_only"),
        "full_graphs": compiled(cudagraph_mode="FULL"),
        "no_split": compiled(splitting_ops=["vllm::mamba_mixer"]),
        "fused_quant": compiled(pass_config={"fuse_attn_quant": True}),
        "other_backend": message_of(
            lambda: engine_config(model, attention_backend="FLASH_ATTN")
        ),
        "other_worker": message_of(
            lambda: engine_config(model, worker_cls="package.Worker")
        ),
        "cut_with_lora": cut(2, enable_lora=True),
        "cut_with_graphs": cut(2),
        "cut_as_measured": cut("auto"),
    }


def kernels() -> dict[str, str]:
    """Where calls on host tensors end: behind vLLM's wrappers, for want of a device."""
    from vllm_attn_offload.attention.cuda.prefill import FlashPrefill

    query = torch.zeros(3, 8, 64, dtype=torch.bfloat16)
    key = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    starts = torch.tensor([0, 1, 3], dtype=torch.int32)
    step = CudaStep(starts, 2, starts.numpy(), 1, starts, None)
    prefill = FlashPrefill()
    rows = torch.tensor([0, 2])
    remote = RemotePart(query[:2], torch.zeros(8, 2), rows, rows)
    output, lse = torch.zeros_like(query), torch.zeros(8, 3)
    return {
        "attend": _end_of(
            lambda: prefill.attend(
                (query, key, key), output, step, LayerAttention(0.125)
            )
        ),
        "merge": _end_of(lambda: prefill.merge(output, lse, remote)),
    }


def _end_of(call: Callable[[], object]) -> str:
    try:
        call()
    except NotImplementedError as error:
        return str(error).splitlines()[0]
    return ""


def ray_executor(model: str) -> dict[str, Any]:
    """The executor of an engine on Ray's hosts, which reaches workers by pickle."""
    offload = {"attention_offload": {"memory_nodes": ["10.0.0.7:7600"]}}
    config = engine_config(
        model, additional_config=offload, distributed_executor_backend="ray"
    )
    executor = Executor.get_class(config)
    sent = pickle.loads(pickle.dumps(config))
    worker = resolve_obj_by_qualname(sent.parallel_config.worker_cls)
    is_same = Executor.get_class(sent) is executor
    worker(sent, 0, 0, "tcp://127.0.0.1:1", True)
    return {
        "executor": [each.__name__ for each in executor.__mro__[:4]],
        "is_async": config.scheduler_config.async_scheduling,
        "is_same_when_sent": is_same,
        "worker_knows": sent.parallel_config.distributed_executor_backend,
    }


def changed_hooks() -> list[str]:
    """Of those that the table of this release has, and of others."""
    table = HookTable.of_source()
    written_for = HookTable.of_release(table.release)
    return [each.name for each in table.differences(written_for)]


def model_runners() -> list[str]:
    """Classes of both model runners import beside our worker."""
    return [
        resolve_obj_by_qualname(name).__module__
        for name in (
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
        )
    ]


def main() -> None:
    """Print one JSON object on the last line."""
    register()
    (model,) = sys.argv[1:]
    found = {
        "imports": imports(),
        "configuration": configuration(model),
        "refusals": refusals(model),
        "kernels": kernels(),
        "model_runners": model_runners(),
        "ray_executor": ray_executor(model),
        "changed_hooks": changed_hooks(),
        "local_devices": local_devices(1, 1, 0, 1),
    }
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
