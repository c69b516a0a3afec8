# SPDX-License-Identifier: Apache-2.0
"""Rows that ask what offloading does to an engine."""

from __future__ import annotations

import queries as q
from panel import Panel

_ENGINE = "{{model_name}} {{engine_index}}"
_VLLM = "{{model_name}} {{engine}}"
_WORKER = f"{_ENGINE} rank {{{{tp_rank}}}}"
_SESSION = f"{{{{node}}}} for {_WORKER}"
_NODE = "{{node}}"

WORTH = (
    Panel(
        "Time of a step",
        "Mean time between tokens, as vLLM measures it; of it, what the worker waits "
        "for memory nodes, and what the busiest node attends. Where nearly all of it "
        "is waiting, attention bounds the engine.",
        "s",
        {
            q.vllm_mean("inter_token_latency_seconds"): f"between tokens {_VLLM}",
            q.per_step("compute_wait_seconds"): f"waiting {_ENGINE}",
            q.per_step("remote_attention_seconds"): f"attending {_ENGINE}",
        },
    ),
    Panel(
        "Share of time waiting for nodes",
        "Of a second, what a worker waits for attention output. Above 60 % over long, "
        "offloading does not pay: add nodes, or give nodes more CPUs or a GPU.",
        "percentunit",
        {q.per_worker("compute_wait_seconds"): _WORKER},
        limit=0.6,
    ),
    Panel(
        "Where the worker's exchange goes",
        "Of a second, what a worker spends on gathering q, k, v, on sending them, and "
        "on waiting for output. Much sending is a slow link or a small socket buffer.",
        "percentunit",
        {
            q.per_worker("compute_pack_seconds"): f"pack {_WORKER}",
            q.per_worker("compute_send_seconds"): f"send {_WORKER}",
            q.per_worker("compute_wait_seconds"): f"wait {_WORKER}",
        },
        is_stacked=True,
    ),
    Panel(
        "Where an attention call goes",
        "Mean time of a layer on a node by what it is spent on; wait is for the rest "
        "of a payload, queue for the turns of other sessions.",
        "s",
        {
            q.per_call(f"remote_{part}_seconds"): f"{name} {_NODE}"
            for part, name in (
                ("receive_wait", "wait"),
                ("queue", "queue"),
                ("store", "store"),
                ("attention", "attend"),
                ("send", "send"),
            )
        },
        is_stacked=True,
    ),
    Panel(
        "Calls and plans",
        "Mean time of a layer on a node, from its arrival to the end of its answer; "
        "and of checking and planning a step, which comes before its first layer.",
        "s",
        {
            q.per_call("remote_layer_seconds"): f"call {_NODE}",
            q.per_call("remote_plan_seconds", "steps"): f"plan {_NODE}",
        },
    ),
    Panel(
        "Exchanges in a step",
        "Steps that a node serves in one step of the engine: one for each KV cache "
        "group, and twice as many where steps are cut in two micro-batches.",
        "none",
        {q.per_step("steps"): _ENGINE},
    ),
    Panel(
        "Generated tokens",
        "Throughput of the engines that offload attention.",
        "suffix: tokens/s",
        {q.vllm_rate("generation_tokens_total"): _VLLM},
        width=16,
    ),
)
CAPACITY = (
    Panel(
        "KV memory of nodes",
        "What a node may hold, and what no engine has reserved. An engine without "
        "kv_cache_gib reserves all: nothing free is usual.",
        "bytes",
        {
            q.node_value("memory_node_kv_bytes_budget"): f"budget {_NODE}",
            q.node_value("memory_node_kv_bytes_free"): f"free {_NODE}",
        },
    ),
    Panel(
        "KV memory by engine",
        "What nodes hold for each worker.",
        "bytes",
        {q.session_value("memory_node_kv_bytes"): _SESSION},
        is_stacked=True,
    ),
    Panel(
        "KV blocks",
        "Blocks that the engine schedules with, and those that each node holds. With "
        "partition heads every node holds some heads of all blocks.",
        "none",
        {
            q.engine_value("pool_blocks"): f"pool {_ENGINE}",
            q.session_value("memory_node_kv_blocks"): _SESSION,
        },
    ),
    Panel(
        "Use of the pool",
        "Share of the engine's KV blocks that running requests hold. Where it stays "
        "near 100 %, requests wait or are preempted.",
        "percentunit",
        {q.vllm_value("kv_cache_usage_perc"): _VLLM},
        limit=0.95,
    ),
    Panel(
        "Requests",
        "Running and waiting requests, and preemptions per second, of engines that "
        "offload attention.",
        "none",
        {
            q.vllm_value("num_requests_running"): f"running {_VLLM}",
            q.vllm_value("num_requests_waiting"): f"waiting {_VLLM}",
            q.vllm_rate("num_preemptions_total"): f"preempted per s {_VLLM}",
        },
    ),
    Panel(
        "Memory of compute workers",
        "KV cache and recurrent states that a worker itself allocated: a block, and "
        "the states of hybrid models.",
        "bytes",
        {
            q.session_value("compute_worker_kv_bytes"): f"KV {_SESSION}",
            q.session_value("compute_worker_state_bytes"): f"states {_SESSION}",
        },
    ),
)
LOSSES = (
    Panel(
        "Nodes that answer",
        "1: every scraped process reaches the node; 0: one does not.",
        "bool_on_off",
        {q.node_value("memory_node_up", take="min"): _NODE},
        kind="stat",
        floor=1,
    ),
    Panel(
        "Recovering engines",
        "1 from the loss of a node until the engine computes again. Meanwhile requests "
        "wait; none fails.",
        "none",
        {q.engine_value("recovering"): _ENGINE},
    ),
    Panel(
        "Generation",
        "Grows whenever an engine opens its sessions anew.",
        "none",
        {q.engine_value("generation"): _ENGINE},
    ),
    Panel(
        "Recoveries",
        "Losses that engines went on after, in the time that is shown.",
        "none",
        {q.engine_increase("recoveries"): _ENGINE},
        kind="stat",
    ),
    Panel(
        "Time of recoveries",
        "Of the last recovery, and of all that fell in the time that is shown.",
        "s",
        {
            q.engine_value("last_recovery_seconds"): f"last {_ENGINE}",
            q.engine_increase("recovery_seconds"): f"all {_ENGINE}",
        },
        kind="stat",
    ),
    Panel(
        "Recomputed tokens",
        "Prompt and answer tokens that losses made engines compute again.",
        "suffix: tokens/s",
        {q.engine_rate("recomputed_tokens"): _ENGINE},
    ),
)
