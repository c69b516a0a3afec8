# SPDX-License-Identifier: Apache-2.0
"""Heads of a layer that one node attends with."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.client.partition import PartitionKind
from vllm_attn_offload.protocol.geometry import LayerGeometry


@dataclass(frozen=True, slots=True)
class NodeHeads:
    """Part of a layer's heads.

    Args:
        query_begin: First head of q.
        num_query_heads: Heads of q.
        kv_begin: First head of k and v.
        num_kv_heads: Heads of k and v.
        has_all: Whether the layer has no others.
    """

    query_begin: int
    num_query_heads: int
    kv_begin: int
    num_kv_heads: int
    has_all: bool

    @classmethod
    def of_node(
        cls, layer: LayerGeometry, kind: PartitionKind, node: int, num_nodes: int
    ) -> NodeHeads:
        """The share of one of several nodes; heads divide evenly."""
        if kind == "blocks" or num_nodes == 1:
            return cls(0, layer.num_query_heads, 0, layer.num_kv_heads, has_all=True)
        query, kv = layer.num_query_heads // num_nodes, layer.num_kv_heads // num_nodes
        return cls(node * query, query, node * kv, kv, has_all=False)

    @property
    def query(self) -> slice:
        """Heads of q."""
        return slice(self.query_begin, self.query_begin + self.num_query_heads)

    @property
    def kv(self) -> slice:
        """Heads of k and v."""
        return slice(self.kv_begin, self.kv_begin + self.num_kv_heads)
