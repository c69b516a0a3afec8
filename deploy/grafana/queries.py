# SPDX-License-Identifier: Apache-2.0
"""PromQL of the dashboard's panels.

Engines show the statistics of all their nodes on ``/metrics``, and nodes show their
own: a series comes from each that is scraped, so every query first takes one of each.
"""

from __future__ import annotations

_TARGET = 'job=~"$job", instance=~"$instance"'
NODE = f'{_TARGET}, node=~"$node"'
ENGINE = f'{_TARGET}, model_name=~"$model_name", engine_index=~"$engine_index"'
#: Of vLLM's own metrics, whose label for the index of an engine is ``engine``.
VLLM = f'{_TARGET}, model_name=~"$model_name", engine=~"$engine_index"'
#: Labels of what `per_worker` returns.
WORKER = "engine, tp_rank, model_name, engine_index"
#: What sessions serve, and how their frames travel.
SESSION_INFO = (
    f'attn_offload:session_info{{{NODE}, model_name=~"$model_name", '
    'engine_index=~"$engine_index"}'
)

_SESSION = "node, engine, tp_rank"
# One series of each session, also while two scrapes see it with different transports.
_INFO = f"topk by ({_SESSION}) (1, {SESSION_INFO})"
# Only nodes' own ports: engines have a process, too, and show several nodes.
_NODE_OF_PROCESS = (
    f"(attn_offload:memory_node_info{{{NODE}}}"
    " unless on (job, instance) attn_offload:engine_generation)"
)


def node_value(name: str, by: str = "node", take: str = "max") -> str:
    """A gauge of nodes."""
    return f"{take} by ({by}) (attn_offload:{name}{{{NODE}}})"


def node_rate(name: str, by: str = "node", window: str = "$__rate_interval") -> str:
    """Increase per second of a counter of nodes."""
    return f"max by ({by}) (rate(attn_offload:{name}_total{{{NODE}}}[{window}]))"


def process(expression: str) -> str:
    """What nodes export of their process, under the names of the nodes."""
    return (
        f"{expression} * on (job, instance) group_left (node) "
        f"max by (job, instance, node) ({_NODE_OF_PROCESS})"
    )


def process_value(name: str) -> str:
    """A gauge of nodes' processes."""
    return process(f"process_{name}{{{_TARGET}}}")


def process_rate(name: str) -> str:
    """Increase per second of a counter of nodes' processes."""
    return process(f"rate(process_{name}_total{{{_TARGET}}}[$__rate_interval])")


def session_value(name: str) -> str:
    """A gauge of sessions, with the model and the index of their engine."""
    return _with_model(f"max by ({_SESSION}) (attn_offload:{name}{{{NODE}}})")


def session_rate(name: str, more: str = "") -> str:
    """Increase per second of a counter of sessions; ``more``: further matchers."""
    counter = f"attn_offload:{name}_total{{{NODE}{more}}}[$__rate_interval]"
    return _with_model(f"max by ({_SESSION}) (rate({counter}))")


def per_worker(name: str) -> str:
    """Seconds per second that a worker counts over all its nodes.

    Each of its sessions repeats the sum.
    """
    return f"max by ({WORKER}) ({session_rate(name)})"


def per_step(name: str) -> str:
    """What an engine's busiest session of rank 0 counts in a step of the engine."""
    first_rank = session_rate(name, ', tp_rank="0"')
    counted = f"max by ({WORKER}) ({first_rank})"
    return f"sum by (model_name, engine_index) ({counted}) / {_engine_steps()}"


def per_call(name: str, calls: str = "layer_calls") -> str:
    """Seconds of a counter of sessions in an attention call or a step, by node."""
    calls = session_rate(calls)
    return f"sum by (node) ({session_rate(name)}) / sum by (node) ({calls})"


def engine_value(name: str) -> str:
    """A gauge of engines."""
    by = "instance, model_name, engine_index"
    return f"max by ({by}) (attn_offload:engine_{name}{{{ENGINE}}})"


def engine_rate(name: str) -> str:
    """Increase per second of a counter of engines."""
    counter = f"attn_offload:engine_{name}_total{{{ENGINE}}}[$__rate_interval]"
    return f"max by (instance, model_name, engine_index) (rate({counter}))"


def engine_increase(name: str) -> str:
    """Increase of a counter of engines over the dashboard's time range."""
    counter = f"attn_offload:engine_{name}_total{{{ENGINE}}}[$__range]"
    return f"max by (instance, model_name, engine_index) (increase({counter}))"


def vllm_value(name: str) -> str:
    """A gauge of vLLM's, of engines that offload attention."""
    return f"vllm:{name}{{{VLLM}}} {_ONLY_OFFLOADING}"


def vllm_rate(name: str) -> str:
    """Increase per second of a counter of vLLM's, of engines that offload attention."""
    return f"rate(vllm:{name}{{{VLLM}}}[$__rate_interval]) {_ONLY_OFFLOADING}"


def vllm_mean(name: str) -> str:
    """Mean of a histogram of vLLM's, of engines that offload attention."""
    total, count = (
        f"sum by (model_name, engine) ({vllm_rate(name + suffix)})"
        for suffix in ("_sum", "_count")
    )
    return f"{total} / {count}"


_ONLY_OFFLOADING = "and on (job, instance) attn_offload:engine_generation"


def _with_model(of_sessions: str) -> str:
    join = f"on ({_SESSION}) group_left (model_name, engine_index)"
    return f"{of_sessions} * {join} {_INFO}"


def _engine_steps() -> str:
    steps = vllm_rate("iteration_tokens_total_count")
    renamed = f'label_replace({steps}, "engine_index", "$1", "engine", "(.+)")'
    return f"sum by (model_name, engine_index) ({renamed})"
