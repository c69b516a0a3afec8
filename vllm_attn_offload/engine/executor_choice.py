# SPDX-License-Identifier: Apache-2.0
"""Which executor runs an engine: its ranks on this host, on several, or in Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor

EXECUTOR_CLS = "vllm_attn_offload.engine.executor.AttentionOffloadExecutor"
RAY_EXECUTOR_CLS = "vllm_attn_offload.engine.ray_executor.RayAttentionOffloadExecutor"
_RAY_V2 = "vllm.v1.executor.ray_executor_v2.RayExecutorV2"
_RAY_V1 = "vllm.v1.executor.ray_executor.RayDistributedExecutor"

_RAY_V2_VARIABLE = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"


def choose_executor(engine_args: EngineArgs) -> None:
    """Set the executor in an engine's arguments.

    Raises:
        ImportError: Ray was asked for and is not installed.
        ValueError: The user chose an executor that cannot be offloaded.
    """
    given = engine_args.distributed_executor_backend
    name = given if isinstance(given, str) or given is None else _path(given)
    if name in ("ray", _RAY_V2, _RAY_V1, RAY_EXECUTOR_CLS):
        _check_ray(engine_args, name)
        engine_args.distributed_executor_backend = _ray_executor()
    elif name not in (None, "mp", "uni", EXECUTOR_CLS):
        raise ValueError(
            f"distributed_executor_backend={given!r} was given together with attention "
            "offloading, which runs its own executors. Allowed: mp, uni, ray or "
            f"{EXECUTOR_CLS}. Choose one of these, or drop the option."
        )
    elif engine_args.nnodes > 1:
        # vLLM takes no other there; `set_executor_of_leader` replaces it.
        engine_args.distributed_executor_backend = "mp"
    else:
        engine_args.distributed_executor_backend = EXECUTOR_CLS


def set_executor_of_leader(vllm_config: VllmConfig) -> None:
    """Set the executor on the finished configuration of an engine over several hosts.

    Followers run vLLM's own: they start workers, and the leader speaks to those.
    """
    parallel = vllm_config.parallel_config
    if parallel.nnodes > 1 and parallel.node_rank_within_dp == 0:
        parallel.distributed_executor_backend = EXECUTOR_CLS


def is_follower(engine_args: EngineArgs) -> bool:
    """Tell whether this process only starts workers of an engine of another host."""
    return engine_args.nnodes > 1 and engine_args.node_rank > 0


def _check_ray(engine_args: EngineArgs, name: str) -> None:
    from vllm import envs
    from vllm.platforms import current_platform

    # Where vLLM has no first executor any more it has no such variable either.
    is_first = name == "ray" and not getattr(envs, _RAY_V2_VARIABLE, True)
    if is_first or name == _RAY_V1:
        given = f"{_RAY_V2_VARIABLE}=0" if is_first else name
        raise ValueError(
            f"{given} was given together with attention offloading. Allowed: vLLM's "
            f"second Ray executor, {_RAY_V2_VARIABLE}=1, because the first one does "
            "not report the loss of a memory node. Unset the variable, and give "
            "--distributed-executor-backend ray."
        )
    if engine_args.nnodes > 1:
        raise ValueError(
            f"nnodes={engine_args.nnodes} was given together with Ray, which finds the "
            "hosts by itself. Allowed: nnodes=1 with Ray, or "
            "distributed_executor_backend=mp. Drop one of the two."
        )
    if not current_platform.ray_device_key:
        raise ValueError(
            "distributed_executor_backend=ray was given for a compute node on "
            f"{current_platform.device_type}, where vLLM places no workers by Ray. "
            "Allowed: GPUs with Ray; mp on any. Drop the option; engines over several "
            "hosts need no Ray (--nnodes)."
        )


def _ray_executor() -> type[Executor]:
    """Return the class itself: vLLM tells by it that an engine uses Ray."""
    from vllm_attn_offload.ray_nodes.cluster import import_ray

    import_ray()
    from vllm_attn_offload.engine.ray_executor import RayAttentionOffloadExecutor

    return RayAttentionOffloadExecutor


def _path(executor: type[Executor]) -> str:
    return f"{executor.__module__}.{executor.__qualname__}"
