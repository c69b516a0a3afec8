# SPDX-License-Identifier: Apache-2.0
"""Engine arguments that switch vLLM to attention offloading."""

from __future__ import annotations

import atexit
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_attn_offload.config import COMMON_CPUS_VARIABLE
from vllm_attn_offload.engine.engine_board import ENGINE_BOARD_VARIABLE, EngineBoard
from vllm_attn_offload.engine.executor_choice import choose_executor, is_follower
from vllm_attn_offload.engine.node_board import NODE_BOARD_VARIABLE, NodeBoard
from vllm_attn_offload.engine.outage_board import BOARD_VARIABLE, OutageBoard
from vllm_attn_offload.engine.start_failure import say_why_at_exit
from vllm_attn_offload.worker.failure_note import NOTE_VARIABLE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

CPU_WORKER_CLS = "vllm_attn_offload.worker.cpu.CpuAttentionOffloadWorker"
GPU_WORKER_CLS = "vllm_attn_offload.worker.gpu.GpuAttentionOffloadWorker"

MIDDLEWARE = (
    "vllm_attn_offload.engine.outage_middleware.OutageMiddleware",
    "vllm_attn_offload.engine.metrics_middleware.MetricsMiddleware",
)
SCHEDULER_CLS = "vllm_attn_offload.engine.scheduler.AttentionOffloadScheduler"
ASYNC_SCHEDULER_CLS = (
    "vllm_attn_offload.engine.scheduler.AsyncAttentionOffloadScheduler"
)

_RUN_DIR_VARIABLE = "ATTN_OFFLOAD_RUN_DIR"
_DATA_PARALLEL_SIZE_VARIABLE = "ATTN_OFFLOAD_DATA_PARALLEL_SIZE"
#: Read by vLLM when it binds workers, and by their OpenMP runtime; set where the user
#: has not.
BINDING_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED_CPUS_VARIABLE = "VLLM_CPU_NUM_OF_RESERVED_CPU"
SPIN_VARIABLE = "GOMP_SPINCOUNT"
#: How vLLM starts workers; set where they must not inherit Ray's connection.
START_METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
_WORKER_VARIABLES = (
    BINDING_VARIABLE,
    RESERVED_CPUS_VARIABLE,
    SPIN_VARIABLE,
    COMMON_CPUS_VARIABLE,
    START_METHOD_VARIABLE,
)
_VARIABLES = (
    _RUN_DIR_VARIABLE,
    _DATA_PARALLEL_SIZE_VARIABLE,
    BOARD_VARIABLE,
    NODE_BOARD_VARIABLE,
    ENGINE_BOARD_VARIABLE,
    NOTE_VARIABLE,
    *_WORKER_VARIABLES,
)
#: What this process set for the engine that it configured last.
_set_here: dict[str, str] = {}


def apply_to_engine_args(engine_args: EngineArgs) -> bool:
    """Set executor, worker and backend, and what only the environment can carry.

    Returns:
        Whether this is the process that starts the engines: one of several API servers
        does not, and finds them started; nor does a follower, which starts workers of
        another host's engine.

    Raises:
        ImportError: Ray was asked for and is not installed.
        ValueError: The user chose another executor, worker or device.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if current_platform.is_cuda():
        # vLLM's selector then reports what the backend does not support.
        _set(engine_args, "attention_backend", AttentionBackendEnum.CUSTOM, (None,))
        worker_cls = GPU_WORKER_CLS
    elif current_platform.is_cpu():
        worker_cls = CPU_WORKER_CLS
    else:
        raise ValueError(
            f"Attention offloading was asked for on {current_platform.device_name}. "
            "This release offloads from CUDA and CPU compute nodes. Install vLLM's "
            "CUDA or CPU build, or run without --attention-offload."
        )
    choose_executor(engine_args)
    _set(engine_args, "worker_cls", worker_cls, ("auto",))
    if is_follower(engine_args):
        return False
    if engine_args._api_process_count > 1 and engine_args._api_process_rank >= 0:
        return False
    directory = _new_run_dir()
    os.environ[_RUN_DIR_VARIABLE] = str(directory)
    say_why_at_exit(OutageBoard.create())
    NodeBoard.create()
    EngineBoard.create()
    # vLLM's frontend kills the engine and its nodes if they do not end at once.
    atexit.register(_remove_run_dirs, directory)
    os.environ[_DATA_PARALLEL_SIZE_VARIABLE] = str(engine_args.data_parallel_size)
    return True


@contextmanager
def environment_of_one_engine() -> Iterator[None]:
    """Take back what an engine and its processes inherit, once they are started.

    Another engine of this process, of stock vLLM perhaps, must not find it.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        # Of an engine in its frontend's process nobody else inherits them.
        _forget(_set_here)


def forget_with(vllm_config: VllmConfig) -> None:
    """Take an engine's variables out of the environment once its frontend is gone.

    Stock vLLM's classes do not say when they have started an engine, but all of them
    keep its configuration. An engine made since has variables of its own. One in the
    same process forgets them earlier (`environment_of_one_engine`).
    """
    ours = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    for name in _WORKER_VARIABLES:  # the user's: ours are set by the executor
        ours.pop(name, None)
    _set_here.clear()
    _set_here.update(ours)
    weakref.finalize(vllm_config, _forget, ours).atexit = False


def choose_scheduler(vllm_config: VllmConfig, recovery_timeout_s: float) -> None:
    """Set the scheduler that takes part in recovery, on a finished configuration.

    Called late, because vLLM decides last if scheduling is asynchronous.

    Raises:
        ValueError: The user chose another scheduler, or vLLM's deadline for a step is
            shorter than the one for a recovery.
    """
    _check_deadline(recovery_timeout_s)
    scheduler = vllm_config.scheduler_config
    ours = ASYNC_SCHEDULER_CLS if scheduler.async_scheduling else SCHEDULER_CLS
    if scheduler.scheduler_cls not in (None, ours):
        raise ValueError(
            f"scheduler_cls={scheduler.scheduler_cls!r} was given together with "
            f"attention offloading, which recovers from lost memory nodes with {ours}. "
            "Drop it, or set on_node_loss to fail."
        )
    scheduler.scheduler_cls = ours


def run_dir(data_parallel_index: int, node_index: int = 0) -> Path:
    """Return the directory of a local memory node's socket.

    The frontend names it and the engine's process inherits the name, so that both find
    the nodes without an address in the (hashed) configuration.
    """
    base = os.environ.get(_RUN_DIR_VARIABLE) or _new_run_dir()
    return Path(f"{base}-{data_parallel_index}-{node_index}")


def data_parallel_size(vllm_config: VllmConfig) -> int:
    """Return the number of engines that share the memory nodes.

    vLLM tells a rank of a dense model that it is alone, so the environment goes first.
    """
    inherited = os.environ.get(_DATA_PARALLEL_SIZE_VARIABLE)
    if inherited:
        return int(inherited)
    return vllm_config.parallel_config.data_parallel_size


def _forget(variables: dict[str, str]) -> None:
    if os.environ.get(_RUN_DIR_VARIABLE) != variables.get(_RUN_DIR_VARIABLE):
        return  # Of an engine made since; their other variables may be the same.
    for name, value in variables.items():
        if os.environ.get(name) == value:
            del os.environ[name]


def _check_deadline(recovery_timeout_s: float) -> None:
    from vllm import envs

    allowed = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    if recovery_timeout_s >= allowed:
        raise ValueError(
            f"recovery_timeout_s={recovery_timeout_s:g} was given. Allowed: less than "
            f"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS={allowed}. Lower the one or raise the "
            "other."
        )


def _new_run_dir() -> Path:
    """Name a directory whose sockets fit wherever vLLM's own, ``<36 bytes>``, do."""
    from vllm import envs

    return Path(envs.VLLM_RPC_BASE_PATH) / f"attn-offload-{uuid.uuid4().hex[:8]}"


def _remove_run_dirs(base: Path) -> None:
    for directory in base.parent.glob(f"{base.name}-*"):
        shutil.rmtree(directory, ignore_errors=True)


def _set(
    engine_args: EngineArgs, name: str, ours: object, replaceable: tuple[object, ...]
) -> None:
    current = getattr(engine_args, name)
    if current not in (*replaceable, ours):
        raise ValueError(
            f"{name}={current!r} was given together with attention offloading, which "
            f"needs {ours}. Drop one of the two."
        )
    setattr(engine_args, name, ours)
