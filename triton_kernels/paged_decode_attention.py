# SPDX-License-Identifier: Apache-2.0
"""Split-KV decode attention over a block table, returning (out, lse).

out = softmax(scale * q k^T) v per query head, lse = log sum exp(scores).
"""

from __future__ import annotations

from typing import Any

import torch

from .decode_arguments import check_options, check_tensors, decode_launch_arguments
from .decode_kernel import paged_decode_attention_kernel
from .decode_plan import DecodeAttentionPlan
from .merge_attn_states import merge_parts_launch
from .prepared_launch import PreparedLaunch

#: Tensors that differ between layers of one kind.
_VARYING = ("query_ptr", "key_cache_ptr", "value_cache_ptr", "out_ptr", "lse_ptr")
_SCALES = ("k_scale_ptr", "v_scale_ptr")
Launch = tuple[Any, tuple[int, ...], dict[str, Any]]


def paged_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodeAttentionPlan,
    *,
    block_table: torch.Tensor,
    softmax_scale: float,
    block_positions: torch.Tensor | None = None,
    block_lens: torch.Tensor | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the planned query rows over the KV blocks that this device holds.

    A row sees the keys at logical positions up to its own, and inside the plan's
    window. A row that sees none gets out = 0 and lse = -inf, ready to be merged. Shards
    of heads need no copy: pass views, every tensor is addressed by strides.

    Args:
        query: ``[num_tokens, num_query_heads, head_size]``, rows of a request adjacent.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_size]``.
        value_cache: ``[num_blocks, num_kv_heads, block_size, v_head_size]``. If it is
            a view of the first columns of ``key_cache``, each key is read once.
        plan: filled by ``plan_decode_attention`` for this step.
        block_table: ``[num_seqs, max_blocks]`` int32, held blocks of each request;
            what follows the planned ones is not read.
        softmax_scale: factor of ``q k^T``.
        block_positions: ``[num_seqs, max_blocks]`` int32, logical position of each
            block's first token; None: (``first_block`` + column) x block_size.
        block_lens: ``[num_seqs, max_blocks]`` int32, valid tokens of each block;
            None: up to the request's length.
        soft_cap: ``cap * tanh(score / cap)``, before ALiBi.
        sinks: ``[num_query_heads]`` float32, a logit without a value. Pass it on one
            device only when partial results are merged.
        alibi_slopes: ``[num_query_heads]`` float32, times (key - query position).
        k_scale: ``[1]`` or ``[num_kv_heads]`` float32, multiplies an fp8 key.
        v_scale: likewise for values; both or neither.
        out: ``[num_tokens, num_query_heads, v_head_size]``; allocated if None.
        lse: ``[num_tokens, num_query_heads]`` float32; allocated if None.

    Returns:
        (out, lse); lse is the natural logarithm.

    Raises:
        ValueError: a tensor does not match the plan.
    """
    if out is None:
        out = query.new_empty((*query.shape[:2], plan.v_head_size))
    if lse is None:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    options = {
        "block_table": block_table,
        "softmax_scale": softmax_scale,
        "block_positions": block_positions,
        "block_lens": block_lens,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    launches = _launches(query, key_cache, value_cache, plan, out, lse, options)
    for kernel, grid, arguments in launches:
        kernel[grid](**arguments)
    return out, lse


def prepare_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodeAttentionPlan,
    *,
    block_table: torch.Tensor,
    softmax_scale: float,
    block_positions: torch.Tensor | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[PreparedLaunch]:
    """Attend as `paged_decode_attention`, and keep the launches.

    Args:
        query: As there, and so are the others.

    Returns:
        Launches that attend once more, in order, with another ``query_ptr``,
        ``key_cache_ptr``, ``value_cache_ptr``, ``out_ptr`` and ``lse_ptr`` of the same
        shapes and strides, until the plan is filled again; and another ``k_scale_ptr``
        and ``v_scale_ptr`` where scales were given.

    Raises:
        ValueError: a tensor does not match the plan.
    """
    options = {
        "block_table": block_table,
        "softmax_scale": softmax_scale,
        "block_positions": block_positions,
        "soft_cap": soft_cap,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    options |= dict.fromkeys(("block_lens", "sinks", "alibi_slopes"))
    launches = _launches(query, key_cache, value_cache, plan, out, lse, options)
    varying = _VARYING if k_scale is None else _VARYING + _SCALES
    return [PreparedLaunch(*launch, varying) for launch in launches]


def _launches(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodeAttentionPlan,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: dict[str, Any],
) -> list[Launch]:
    """Kernels, their grids and their arguments."""
    check_tensors(query, key_cache, value_cache, plan, out, lse)
    check_options(
        plan,
        options["block_table"],
        options["block_positions"],
        options["block_lens"],
        options["k_scale"],
        options["v_scale"],
    )
    launches: list[Launch] = []
    num_items = plan.max_items if plan.fixed_grid else plan.num_items
    if num_items:
        arguments = decode_launch_arguments(
            query, key_cache, value_cache, plan, out=out, lse=lse, **options
        )
        grid = (num_items * plan.num_kv_heads,)
        launches.append((paged_decode_attention_kernel, grid, arguments))
    merge = merge_parts_launch(plan, out, lse)
    return launches if merge is None else [*launches, merge]
