# SPDX-License-Identifier: Apache-2.0
"""`doctor --probe`: exchange layers with the nodes as engines do, and time it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.extras import install_command, missing_modules

_NAME = "exchange"
_BUDGET_S = 2.0
_BLOCK_SIZE = 128
#: Query heads, KV heads and head size of a model with 1B parameters, and its layers.
_HEADS = (16, 4, 128)
_NUM_LAYERS = 16


def probe_exchange(case: Case, has_failed: bool = False) -> Iterator[Finding]:
    """Open a session on every node in use, fill it, and decode some steps.

    Args:
        case: What the engine would be.
        has_failed: Whether another check has; nothing is measured then.
    """
    if not case.config.addresses:
        yield Finding.warn(
            _NAME,
            "not measured: no node of this engine runs before it does",
            "addresses of memory nodes that run",
            "Name them with --memory-nodes, or leave --probe out.",
        )
        return
    if has_failed:
        yield Finding.warn(
            _NAME,
            "not measured: another check failed",
            "checks that do not fail",
            "Correct what failed, and ask again.",
        )
        return
    if missing := missing_modules("torch"):
        yield Finding.warn(
            _NAME,
            f"not measured: there is no {missing} here",
            "torch, whose tensors are exchanged",
            f"Leave --probe out, or run: {install_command('torch')}",
        )
        return
    try:
        yield _measured(case)
    except (MemoryNodeError, ValueError) as error:
        yield Finding.of_error(_NAME, error, "nodes with room for a short session")


def _measured(case: Case) -> Finding:
    from vllm_attn_offload.planner.calibrate.node_probe import (
        QUICK_GRID,
        NodeProbe,
        model_geometry,
    )

    shape = case.model_shape()
    heads, num_layers = _HEADS, _NUM_LAYERS
    if shape is not None:
        layer = shape.layers[0]
        size = layer.q_elements // layer.num_heads
        heads = layer.num_heads, layer.num_kv_heads, size
        num_layers = shape.num_layers
    probe = NodeProbe(
        case.config.addresses,
        model_geometry(num_layers, *heads, "bfloat16", _BLOCK_SIZE),
        lambda rows: lambda: None,
        QUICK_GRID,
        case.config.credentials,
    )
    result = probe.run(_BUDGET_S)
    first = probe.points[0][2].exchange_s
    network, node = result.network, result.node
    of = shape.name if shape else "a model with 1B parameters"
    return Finding.ok(
        _NAME,
        f"a layer of {of} takes {first * 1e6:.0f} us for one short request; "
        f"{cast(float, network['gbps']):.1f} Gbit/s on the way, "
        f"{cast(float, node['attention_gbps']):.1f} GB/s of KV attended on each node",
    )
