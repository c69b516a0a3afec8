# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of memory nodes and engines; `catalogue` lists all of them."""

from vllm_attn_offload.metrics.engine_collector import EngineCollector
from vllm_attn_offload.metrics.stats_collector import StatsCollector

__all__ = ["EngineCollector", "StatsCollector"]
