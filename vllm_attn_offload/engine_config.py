# SPDX-License-Identifier: Apache-2.0
"""The engine arguments that switch vLLM over to attention offloading."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

EXECUTOR_CLS = "vllm_attn_offload.executor.AttentionOffloadExecutor"
CPU_WORKER_CLS = "vllm_attn_offload.cpu_worker.CpuAttentionOffloadWorker"

_RUN_DIR_VARIABLE = "ATTN_OFFLOAD_RUN_DIR"


def apply_to_engine_args(engine_args: EngineArgs) -> None:
    """Set executor and worker, and name a directory for local memory nodes.

    Raises:
        ValueError: The user chose another executor, worker or device.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ValueError(
            f"Attention offloading was asked for on {current_platform.device_name}. "
            "This release offloads from CPU compute nodes only. Install vLLM's CPU "
            "build, or run without --attention-offload."
        )
    _set(engine_args, "distributed_executor_backend", EXECUTOR_CLS, (None, "mp", "uni"))
    _set(engine_args, "worker_cls", CPU_WORKER_CLS, ("auto",))
    os.environ[_RUN_DIR_VARIABLE] = str(_new_run_dir())


def run_dir(data_parallel_rank: int) -> Path:
    """Where the sockets of an engine's local memory nodes live.

    The frontend names it and the engine's process inherits the name, so that both find
    the nodes without an address in the (hashed) configuration.
    """
    base = os.environ.get(_RUN_DIR_VARIABLE) or _new_run_dir()
    return Path(f"{base}-{data_parallel_rank}")


def _new_run_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"attn-offload-{uuid.uuid4().hex[:12]}"


def _set(
    engine_args: EngineArgs, name: str, ours: str, replaceable: tuple[str | None, ...]
) -> None:
    current = getattr(engine_args, name)
    if current not in (*replaceable, ours):
        raise ValueError(
            f"{name}={current!r} was given together with attention offloading, which "
            f"needs {ours}. Drop one of the two."
        )
    setattr(engine_args, name, ours)
