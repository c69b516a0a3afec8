# SPDX-License-Identifier: Apache-2.0
"""How slow a node may be before it counts as lost."""

from __future__ import annotations

from vllm_attn_offload.client.node_exchange import ROWS_PER_READ
from vllm_attn_offload.protocol.geometry import SessionGeometry

#: Attention is allowed these rates before its node counts as lost. One core is twenty
#: times faster and more; turns are a slice for each engine, so this covers a queue of
#: twenty engines that are as busy. Waiting for one's turn alone takes milliseconds of
#: the deadline that every answer has.
_SLOWEST_BYTES_PER_S = 50e6
_SLOWEST_FLOP_PER_S = 1e9


def slowest_token_s(geometry: SessionGeometry) -> float:
    """Seconds for one token and ``ROWS_PER_READ`` rows in a layer, on a slow node.

    Its K and V are read once, or, with many query heads for each, computing is longer.
    """
    return max(
        (layer.head_size + layer.v_head_size)
        * max(
            layer.num_kv_heads * 4 / _SLOWEST_BYTES_PER_S,
            layer.num_query_heads * 2 * ROWS_PER_READ / _SLOWEST_FLOP_PER_S,
        )
        for layer in geometry.layers
    )
