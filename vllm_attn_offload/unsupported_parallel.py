# SPDX-License-Identifier: Apache-2.0
"""Ways to run an engine in parallel that are refused."""

from __future__ import annotations

from typing import Any

from vllm_attn_offload.unsupported import (
    DROP,
    Unsupported,
    above_one,
    is_set,
    not_in,
)


def _ranks_and_hosts(settings: Any) -> str:
    if min(settings.nnodes, settings.data_parallel_size) == 1:
        return ""
    return (
        f"data_parallel_size={settings.data_parallel_size} with "
        f"nnodes={settings.nnodes}"
    )


# EngineArgs and ParallelConfig share these names. Both are checked: vLLM blames the
# executor for some of them before a config exists, and drops some on CPU.
UNSUPPORTED_PARALLEL = (
    Unsupported(
        "Pipeline parallelism",
        above_one("pipeline_parallel_size"),
        "pipeline_parallel_size=1",
        "Use tensor parallelism.",
    ),
    Unsupported(
        "Context parallelism",
        above_one("decode_context_parallel_size", "prefill_context_parallel_size"),
        "decode_context_parallel_size=1 and prefill_context_parallel_size=1",
        "Drop both; memory nodes already spread the context.",
    ),
    Unsupported(
        "Data parallelism with nnodes",
        _ranks_and_hosts,
        "one engine over several hosts, or engines on a host each without nnodes",
        "Give each host --data-parallel-size-local and --data-parallel-start-rank "
        "(second and later ones --headless, too), or start a server per engine.",
    ),
    Unsupported(
        "Data parallelism by Ray",
        not_in(("mp",), "data_parallel_backend", "data_parallel_backend={}"),
        "data_parallel_backend=mp: Ray keeps the environment of this process from "
        "engines, by which they find each other and divide memory",
        "Drop --data-parallel-backend, or start a server per engine.",
    ),
    Unsupported("Dual-batch overlap", is_set("enable_dbo"), "enable_dbo unset", DROP),
    Unsupported(
        "Fault tolerance of data-parallel ranks",
        is_set("enable_fault_tolerance"),
        "enable_fault_tolerance unset: lost memory nodes are recovered from without it",
        DROP,
    ),
    Unsupported(
        "Elastic expert parallelism",
        is_set("enable_elastic_ep"),
        "enable_elastic_ep unset",
        DROP,
    ),
)
