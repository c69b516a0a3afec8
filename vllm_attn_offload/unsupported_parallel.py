# SPDX-License-Identifier: Apache-2.0
"""Ways to run an engine in parallel that are refused."""

from __future__ import annotations

from vllm_attn_offload.unsupported import DROP, Unsupported, above_one, is_set

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
    Unsupported("Engines over several hosts", above_one("nnodes"), "nnodes=1", DROP),
    Unsupported("Dual-batch overlap", is_set("enable_dbo"), "enable_dbo unset", DROP),
    Unsupported(
        "Elastic expert parallelism",
        is_set("enable_elastic_ep"),
        "enable_elastic_ep unset",
        DROP,
    ),
)
