# SPDX-License-Identifier: Apache-2.0
"""Decode workloads of the kernel benchmark, and the kernels that are timed on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Workload:
    """One row of the bandwidth table."""

    model: str
    kv_dtype: str
    seq_lens: tuple[int, ...]

    @property
    def heads(self) -> tuple[int, int]:
        return {"llama-8b": (32, 8), "llama-70b": (64, 8), "tiny": (4, 2)}[self.model]

    @property
    def name(self) -> str:
        shape = f"{len(self.seq_lens)}x{max(self.seq_lens)}"
        if len(set(self.seq_lens)) > 1:
            shape += "-skewed"
        return f"{self.model}-{self.kv_dtype}-{shape}"


@dataclass
class Inputs:
    """Tensors of one workload; the caches are [blocks, KV heads, slots, head size]."""

    workload: Workload
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    scale: float

    @property
    def kv_bytes(self) -> int:
        slot = self.key_cache.shape[1] * self.key_cache.shape[3]
        return 2 * sum(self.workload.seq_lens) * slot * self.key_cache.itemsize


def draw_inputs(workload: Workload, device: torch.device) -> Inputs:
    """Random tensors; blocks shuffled, so that no provider reads a request in order."""
    query_heads, kv_heads = workload.heads
    head_size = 64 if workload.model == "tiny" else 128
    blocks = [-(-n // BLOCK_SIZE) for n in workload.seq_lens]
    ids = torch.randperm(sum(blocks), dtype=torch.int32)
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, part in zip(table, ids.split(blocks), strict=True):
        row[: len(part)] = part
    shape = (sum(blocks), kv_heads, BLOCK_SIZE, head_size)
    dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[workload.kv_dtype]
    caches = [
        torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
        for _ in range(2)
    ]
    return Inputs(
        workload=workload,
        query=torch.randn(
            len(blocks), query_heads, head_size, device=device, dtype=torch.bfloat16
        ),
        key_cache=caches[0],
        value_cache=caches[1],
        seq_lens=torch.tensor(workload.seq_lens, dtype=torch.int32),
        block_table=table.to(device),
        scale=head_size**-0.5,
    )


Call = Callable[[], torch.Tensor]


def provide_ours(inputs: Inputs) -> Call:
    from vllm_attn_offload.triton_kernels import (
        DecodeAttentionPlan,
        paged_decode_attention,
        plan_decode_attention,
    )

    query_heads, kv_heads = inputs.workload.heads
    num_seqs = len(inputs.workload.seq_lens)
    plan = DecodeAttentionPlan(
        max_num_seqs=num_seqs,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        head_size=inputs.query.shape[2],
        block_size=BLOCK_SIZE,
        query_dtype=inputs.query.dtype,
        kv_cache_dtype=inputs.key_cache.dtype,
        device=inputs.query.device,
    )
    starts = torch.arange(num_seqs + 1, dtype=torch.int32)
    plan_decode_attention(plan, starts, inputs.seq_lens)
    out = torch.empty_like(inputs.query)
    lse = torch.empty(out.shape[:2], device=out.device)

    def call() -> torch.Tensor:
        return paged_decode_attention(
            inputs.query,
            inputs.key_cache,
            inputs.value_cache,
            plan,
            block_table=inputs.block_table,
            softmax_scale=inputs.scale,
            out=out,
            lse=lse,
        )[0]

    return call


def provide_torch_sdpa(inputs: Inputs) -> Call:
    """SDPA on contiguous K and V: it cannot read a block table, so it gets no table."""
    lens = set(inputs.workload.seq_lens)
    if len(lens) > 1 or inputs.key_cache.dtype == torch.float8_e4m3fn:
        raise NotImplementedError("needs equal lengths and a bf16 cache")
    length = lens.pop()
    keys, values = (
        cache[inputs.block_table.long()]
        .transpose(1, 2)
        .flatten(2, 3)[:, :, :length]
        .contiguous()
        for cache in (inputs.key_cache, inputs.value_cache)
    )
    query = inputs.query.unsqueeze(2)

    def call() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=inputs.scale, enable_gqa=True
        ).squeeze(2)

    return call


def _slot_major(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches as vLLM lays them out: [blocks, slots, KV heads, head size]."""
    if inputs.query.device.type != "cuda":
        raise NotImplementedError("needs a CUDA GPU")
    key, value = inputs.key_cache, inputs.value_cache
    return key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()


def provide_vllm_unified(inputs: Inputs) -> Call:
    """vLLM 0.32's default Triton kernel, with the buffers that its backend makes."""
    key, value = _slot_major(inputs)
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    is_fp8 = key.dtype == torch.float8_e4m3fn
    num_seqs, device = len(inputs.workload.seq_lens), inputs.query.device
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
    lens = inputs.seq_lens.to(device)
    out = torch.empty_like(inputs.query)
    one = torch.ones(num_seqs, key.shape[2], device=device)
    buffers = _segment_buffers(inputs)

    def call() -> torch.Tensor:
        unified_attention(
            q=inputs.query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=max(inputs.workload.seq_lens),
            softmax_scale=inputs.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=inputs.block_table,
            softcap=0,
            q_descale=None,
            k_descale=one,
            v_descale=one,
            kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if is_fp8 else KVQuantMode.NONE,
            **buffers,
        )
        return out

    return call


def _segment_buffers(inputs: Inputs) -> dict[str, Any]:
    """Buffers of vLLM's kernel for contexts that several programs share."""
    _, num_heads, head_size = inputs.query.shape
    num_rows, segments = max(1, 128 // inputs.key_cache.shape[1]), 16
    peaks = inputs.query.new_empty(num_rows, num_heads, segments, dtype=torch.float32)
    return {
        "seq_threshold_3D": num_rows,
        "num_par_softmax_segments": segments,
        "softmax_segm_output": peaks.new_empty(*peaks.shape, head_size),
        "softmax_segm_max": peaks,
        "softmax_segm_expsum": torch.empty_like(peaks),
    }


def provide_vllm_decode(inputs: Inputs) -> Call:
    """vLLM 0.32's decode-only Triton kernel with 8 splits."""
    key, value = _slot_major(inputs)
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    num_seqs, num_heads, head_size = inputs.query.shape
    device = inputs.query.device
    logits = torch.empty(num_seqs, num_heads, 8, head_size + 1, device=device)
    lse = torch.empty(num_seqs, num_heads, device=device)
    lens = inputs.seq_lens.to(device)
    one = torch.ones((), device=device)
    out = torch.empty_like(inputs.query)

    def call() -> torch.Tensor:
        decode_attention_fwd(
            inputs.query,
            key,
            value,
            out,
            lse,
            inputs.block_table,
            lens,
            logits,
            8,
            inputs.scale,
            page_size=BLOCK_SIZE,
            k_scale=one,
            v_scale=one,
        )
        return out

    return call


def provide_flashinfer(inputs: Inputs) -> Call:
    """FlashInfer's batch decode on the same blocks."""
    import flashinfer

    device = inputs.query.device
    num_seqs, num_heads, head_size = inputs.query.shape
    blocks = (inputs.seq_lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
    starts[1:] = blocks.cumsum(0)
    rows = [inputs.block_table[i, :n] for i, n in enumerate(blocks.tolist())]
    workspace = torch.empty(2**28, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(
        starts.to(device),
        torch.cat(rows),
        ((inputs.seq_lens - 1) % BLOCK_SIZE + 1).to(device),
        num_heads,
        inputs.key_cache.shape[1],
        head_size,
        BLOCK_SIZE,
        q_data_type=inputs.query.dtype,
        kv_data_type=inputs.key_cache.dtype,
    )
    out = torch.empty_like(inputs.query)
    caches = (inputs.key_cache, inputs.value_cache)
    return lambda: wrapper.run(inputs.query, caches, out=out)


PROVIDERS: dict[str, Callable[[Inputs], Call]] = {
    "ours": provide_ours,
    "torch_sdpa": provide_torch_sdpa,
    "vllm_unified": provide_vllm_unified,
    "vllm_decode": provide_vllm_decode,
    "flashinfer": provide_flashinfer,
}
