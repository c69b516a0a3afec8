# SPDX-License-Identifier: Apache-2.0
"""Every metric that this package exports, for documents and dashboards."""

from __future__ import annotations

from vllm_attn_offload.metrics.engine import ENGINE_METRICS
from vllm_attn_offload.metrics.metric import OffloadMetric
from vllm_attn_offload.metrics.node import NODE_METRICS
from vllm_attn_offload.metrics.session import SESSION_METRICS

#: Those of engines are on vLLM's ``/metrics`` only.
ALL_METRICS: tuple[OffloadMetric, ...] = (
    *NODE_METRICS,
    *SESSION_METRICS,
    *ENGINE_METRICS,
)
