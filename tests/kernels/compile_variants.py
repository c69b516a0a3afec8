# SPDX-License-Identifier: Apache-2.0
"""Compile kernel variants for GPUs that are not here; prints one JSON row per variant.

Run as a script, without TRITON_INTERPRET: ``compile_variants.py [PART PARTS]``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_attn_offload.triton_kernels.decode_arguments import decode_launch_arguments
from vllm_attn_offload.triton_kernels.decode_kernel import paged_decode_attention_kernel
from vllm_attn_offload.triton_kernels.decode_plan import DecodeAttentionPlan
from vllm_attn_offload.triton_kernels.merge_attn_states import (
    _merge_parts_kernel,
    merge_parts_arguments,
)
from vllm_attn_offload.triton_kernels.store_kv import (
    _store_kv_kernel,
    store_kv_arguments,
)
from vllm_attn_offload.triton_kernels.tiles import choose_decode_tile

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel, a geometry and the flags that are on."""

    name: str
    heads: tuple[int, int] = (32, 8)
    head_size: int = 128
    v_head_size: int | None = None
    block_size: int = 16
    query_len: int = 1
    query_dtype: torch.dtype = BF16
    kv_dtype: torch.dtype | None = None
    flags: tuple[str, ...] = ()
    kernel: str = "decode"


VARIANTS = [
    Variant("gqa4-128-bf16"),
    Variant("gqa4-128-fp16", query_dtype=torch.float16),
    Variant("gqa4-128-fp32", query_dtype=torch.float32),
    Variant("gqa4-128-fp8", kv_dtype=FP8, flags=("scales",)),
    Variant("gqa8-128-bf16-block256", heads=(64, 8), block_size=256),
    Variant("gqa4-128-bf16-query16", query_len=16),
    Variant("mha-64-bf16", heads=(32, 32), head_size=64),
    Variant("mha-80-bf16", heads=(32, 32), head_size=80),
    Variant("mha-96-bf16", heads=(32, 32), head_size=96),
    Variant("mla-192-128-bf16", heads=(16, 16), head_size=192, v_head_size=128),
    Variant("gqa4-256-bf16", heads=(16, 4), head_size=256),
    Variant("mqa32-128-bf16", heads=(32, 1)),
    Variant("latent16-576-512-bf16", heads=(16, 1), head_size=576, v_head_size=512),
    Variant(
        "latent16-576-512-fp8",
        heads=(16, 1),
        head_size=576,
        v_head_size=512,
        kv_dtype=FP8,
    ),
    Variant("latent128-576-512-bf16", heads=(128, 1), head_size=576, v_head_size=512),
    Variant(
        "gqa4-128-bf16-every-flag",
        flags=("positions", "lens", "window", "soft_cap", "sinks", "alibi"),
    ),
    Variant(
        "gqa2-256-bf16-window-cap",
        heads=(32, 16),
        head_size=256,
        flags=("window", "soft_cap"),
    ),
    Variant("parts-gqa4-128", kernel="parts"),
    Variant("store-gqa4-128-bf16", kernel="store"),
    Variant("store-gqa4-128-fp8", kernel="store", kv_dtype=FP8, flags=("scales",)),
]


def make_plan(variant: Variant, architecture: str) -> DecodeAttentionPlan:
    """The plan of a variant with the architecture's tile, its buffers on the CPU."""
    query_heads, kv_heads = variant.heads
    kv_dtype = variant.kv_dtype or variant.query_dtype
    return DecodeAttentionPlan(
        max_num_seqs=1,
        max_query_len=variant.query_len,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        head_size=variant.head_size,
        v_head_size=variant.v_head_size,
        block_size=variant.block_size,
        query_dtype=variant.query_dtype,
        kv_cache_dtype=kv_dtype,
        device=torch.device("cpu"),
        sliding_window=64 if "window" in variant.flags else None,
        tile=choose_decode_tile(
            architecture,
            variant.head_size,
            variant.query_len * (query_heads // kv_heads),
            kv_dtype.itemsize,
        ),
    )


def launch_arguments(
    variant: Variant, plan: DecodeAttentionPlan
) -> tuple[triton.JITFunction, dict[str, Any]]:
    """The kernel and what a launch of this variant passes, on one-block tensors."""
    query_heads, kv_heads = variant.heads
    dtype = variant.query_dtype
    shape = (1, kv_heads, variant.block_size, variant.head_size)
    key_cache = torch.zeros(shape).to(plan.kv_cache_dtype)
    value_cache = key_cache[..., : plan.v_head_size]
    if "latent" not in variant.name:
        value_cache = value_cache.contiguous().clone()
    query = torch.zeros(variant.query_len, query_heads, variant.head_size, dtype=dtype)
    out = query[..., : plan.v_head_size].contiguous()
    lse = torch.zeros(variant.query_len, query_heads)
    numbers = torch.ones(query_heads)
    scales = numbers[:kv_heads] if "scales" in variant.flags else None
    if variant.kernel == "parts":
        return _merge_parts_kernel, merge_parts_arguments(plan, out, lse)
    if variant.kernel == "store":
        slots = torch.zeros(variant.query_len, dtype=torch.int64)
        new = query[:, :kv_heads].contiguous()
        caches = (key_cache, value_cache)
        return _store_kv_kernel, store_kv_arguments(
            new, new.clone(), *caches, slots, scales, scales
        )
    table = torch.zeros(1, 1024, dtype=torch.int32)
    flags = variant.flags
    return paged_decode_attention_kernel, decode_launch_arguments(
        query,
        key_cache,
        value_cache,
        plan,
        block_table=table,
        softmax_scale=0.1,
        block_positions=table if "positions" in flags else None,
        block_lens=table if "lens" in flags else None,
        soft_cap=30.0 if "soft_cap" in flags else None,
        sinks=numbers if "sinks" in flags else None,
        alibi_slopes=numbers if "alibi" in flags else None,
        k_scale=scales,
        v_scale=scales,
        out=out,
        lse=lse,
    )


def specialise(
    kernel: triton.JITFunction, arguments: dict[str, Any]
) -> tuple[ASTSource, dict[str, Any]]:
    """Type the arguments as a launch does: aligned pointers, multiples of 16, ones."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            dtype = triton.runtime.jit.type_canonicalisation_dict[
                str(value.dtype).split(".")[-1]
            ]
            signature[parameter.name] = "*" + dtype
            divisible = True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            divisible = False
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    names = {parameter.name for parameter in kernel.params}
    options = {k: v for k, v in arguments.items() if k not in names}
    return ASTSource(kernel, signature, constants, attributes), options


def compile_variant(variant: Variant, architecture: str) -> dict[str, Any]:
    """Compile one variant and read its resources from the cubin and the PTX."""
    plan = make_plan(variant, architecture)
    kernel, arguments = launch_arguments(variant, plan)
    source, options = specialise(kernel, arguments)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    return {
        "name": variant.name,
        "architecture": architecture,
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "ctas_per_sm": plan.tile.ctas_per_sm if variant.kernel == "decode" else 1,
        # cp.async.cg exists for 16 bytes only.
        "loads_of_16_bytes": len(
            re.findall(r"cp\.async\.cg\.shared|ld\.global\S*\.v4\.b32", ptx)
        ),
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        name: int(n) for name, n in re.findall(r"\b([A-Z]+)(?:\[\d\])?:(\d+)", text)
    }


def main() -> None:
    part, parts = (int(x) for x in sys.argv[1:3]) if len(sys.argv) > 2 else (0, 1)
    work = [(v, a) for v in VARIANTS for a in ARCHITECTURES]
    for variant, architecture in work[part::parts]:
        sys.stdout.write(json.dumps(compile_variant(variant, architecture)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
