# SPDX-License-Identifier: Apache-2.0
"""Launches of a step's layers on a GPU, prepared once for layers that are alike."""

from __future__ import annotations

from typing import Any

import torch

from vllm_attn_offload.memory_node.decode_attention.kernel_plan import KernelPlan
from vllm_attn_offload.memory_node.decode_attention.payload_views import payload_views
from vllm_attn_offload.memory_node.decode_attention.triton_attention import (
    Pool,
    attend_rows,
)
from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.triton_kernels import (
    PreparedLaunch,
    prepare_decode_attention,
    prepare_store_kv,
)


class LayerLaunches:
    """Kernels of the layers of one plan, enqueued on the current stream.

    Layers of one shape differ in the addresses of their blocks and rows alone. The plan
    owns its launches, and not they it: its memory goes with its last user.
    """

    def __init__(self) -> None:
        self._stores: dict[Any, PreparedLaunch] = {}
        self._attends: dict[Any, list[PreparedLaunch]] = {}

    def forget(self) -> None:
        """Prepare anew: the plan was filled, and has other tables and lengths."""
        self._stores.clear()
        self._attends.clear()

    def store(
        self,
        pool: Pool,
        plan: KernelPlan,
        rows: torch.Tensor,
        layout: PayloadLayout,
        stream: int,
    ) -> None:
        """Write k and v of all rows into the pool.

        Args:
            pool: Blocks of the layer.
            plan: Whose launches these are.
            rows: uint8 ``[num_bytes]`` on the device, payload of a LAYER.
            layout: Where q, k and v lie in it.
            stream: Handle of the current stream.
        """
        if not layout.num_tokens:
            return
        begin = rows.data_ptr()
        pointers = {
            "key_ptr": begin + layout.key.offset,
            "value_ptr": begin + layout.value.offset,
            "key_cache_ptr": pool.key.data_ptr(),
            "value_cache_ptr": pool.value.data_ptr(),
            **pool.scale_pointers,
        }
        kind = (pool.shape, pool.key.stride(0), layout)
        prepared = self._stores.get(kind)
        if prepared is None or not prepared.again(pointers, stream):
            elements = rows.view(pool.dtype)
            _, key, value = payload_views(elements, layout, pool.layer, elements.dtype)
            self._stores[kind] = prepare_store_kv(
                key, value, pool.key, pool.value, plan.slot_mapping, **pool.scales
            )

    def attend(
        self,
        pool: Pool,
        plan: KernelPlan,
        rows: torch.Tensor,
        layout: PayloadLayout,
        out: torch.Tensor,
        lse: torch.Tensor,
        stream: int,
    ) -> None:
        """Attend for all queries, or for those of the plan's next part.

        Args:
            pool: Blocks of the layer.
            plan: Whose launches these are.
            rows: uint8 ``[num_bytes]`` on the device, payload of a LAYER.
            layout: Where q, k and v lie in it.
            out: uint8 on the device, filled with ``[num_query_rows, num_query_heads,
                v_head_size]`` elements; may be longer.
            lse: uint8, alike, with ``[num_query_rows, num_query_heads]`` in fp32.
            stream: Handle of the current stream.
        """
        if plan.num_parts > 1 or pool.slopes is not None:
            results = _results(pool, plan, out, lse)
            attend_rows(pool, plan, rows.view(pool.dtype), layout, *results)
            return
        pointers = {
            "query_ptr": rows.data_ptr() + layout.query.offset,
            "key_cache_ptr": pool.key.data_ptr(),
            "value_cache_ptr": pool.value.data_ptr(),
            "out_ptr": out.data_ptr(),
            "lse_ptr": lse.data_ptr(),
            **pool.scale_pointers,
        }
        layer = pool.layer
        scores = (layer.softmax_scale, layer.soft_cap)
        kind = (pool.shape, pool.key.stride(0), scores, layout)
        prepared = self._attends.get(kind)
        if prepared is None or not all(
            launch.again(pointers, stream) for launch in prepared
        ):
            elements = rows.view(pool.dtype)
            query, _, _ = payload_views(elements, layout, layer, elements.dtype)
            out, lse = _results(pool, plan, out, lse)
            self._attends[kind] = prepare_decode_attention(
                query,
                pool.key,
                pool.value,
                plan.by_shape[pool.shape],
                block_table=plan.block_table,
                block_positions=plan.block_positions,
                softmax_scale=layer.softmax_scale,
                soft_cap=layer.soft_cap or None,
                **pool.scales,
                out=out,
                lse=lse,
            )


def _results(
    pool: Pool, plan: KernelPlan, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes as ``[num_query_rows, num_query_heads, v_head_size]`` and without sizes."""
    shape = (plan.num_query_rows, pool.shape.num_query_heads, pool.shape.v_head_size)
    num_rows = shape[0] * shape[1]
    out_bytes = num_rows * shape[2] * pool.dtype.itemsize
    return (
        out[:out_bytes].view(pool.dtype).view(shape),
        lse[: 4 * num_rows].view(torch.float32).view(shape[:2]),
    )
