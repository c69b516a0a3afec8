# SPDX-License-Identifier: Apache-2.0
"""Shapes and features of decode attention that tests and benchmarks check."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class DecodeCase:
    """One problem; ``scales`` is ``""``, ``"tensor"`` or ``"head"``.

    ``positions`` are those of first rows; none: the rows are the last tokens. Blocks
    before the ``first_blocks``-th are not in the table.
    """

    name: str
    seq_lens: tuple[int, ...] = (1, 15, 16, 17, 0, 64, 33)
    query_lens: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    first_blocks: tuple[int, ...] = ()
    heads: tuple[int, int] = (8, 2)
    head_size: int = 64
    v_head_size: int | None = None
    is_latent: bool = False
    block_size: int = 16
    dtype: torch.dtype = FP32
    kv_dtype: torch.dtype | None = None
    scales: str = ""
    native_fp8: bool = True
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    is_subset: bool = False
    num_slots: int = 1


_EVERY_FLAG = DecodeCase(
    "flags-all",
    seq_lens=(3, 70, 129),
    query_lens=(3, 1, 2),
    positions=(3, 69, 100),
    window=40,
    soft_cap=5.0,
    has_sinks=True,
    has_alibi=True,
    is_subset=True,
    num_slots=64,
)
CASES = [
    DecodeCase("gqa4-64-fp32"),
    DecodeCase("gqa4-64-fp16", dtype=FP16),
    DecodeCase("gqa4-64-bf16", dtype=BF16),
    DecodeCase("size80-bf16", head_size=80, dtype=BF16),
    DecodeCase("size96-fp16", head_size=96, dtype=FP16),
    DecodeCase("size128-bf16", head_size=128, dtype=BF16),
    DecodeCase("size192-128", head_size=192, v_head_size=128),
    DecodeCase("size256-bf16", head_size=256, dtype=BF16),
    DecodeCase("size576-512", (17, 33), head_size=576, v_head_size=512, heads=(4, 1)),
    DecodeCase(
        "latent-576-512-bf16",
        (17, 70),
        heads=(40, 1),
        head_size=576,
        v_head_size=512,
        is_latent=True,
        dtype=BF16,
    ),
    DecodeCase("mha", heads=(4, 4)),
    DecodeCase("mqa", heads=(8, 1)),
    DecodeCase("group3", heads=(9, 3)),
    DecodeCase("group24", heads=(24, 1), query_lens=(1,) * 7),
    DecodeCase("block32", (31, 32, 33, 63, 64, 65), block_size=32),
    DecodeCase("block48", (47, 48, 49, 96, 97), block_size=48),
    DecodeCase("block64", (63, 64, 65, 127, 129), block_size=64, dtype=BF16),
    DecodeCase("block256", (255, 256, 257, 1), block_size=256),
    DecodeCase("query2", (2, 17, 0, 64, 33), (2, 2, 0, 2, 1)),
    DecodeCase("query16", (16, 47), (16, 16), heads=(2, 1), dtype=BF16),
    DecodeCase("query16-two-tiles", (16, 80), (16, 13), heads=(8, 1)),
    DecodeCase("window", (1, 40, 41, 200), window=40),
    DecodeCase("window-query3", (3, 60, 130), (3, 2, 3), window=17, dtype=BF16),
    DecodeCase("window1", (1, 17, 33), window=1),
    DecodeCase("soft-cap", soft_cap=2.0),
    DecodeCase("sinks", has_sinks=True),
    DecodeCase("sinks-split", (0, 300), (1, 1), has_sinks=True, num_slots=8),
    DecodeCase("alibi", has_alibi=True),
    DecodeCase("alibi-query4", (4, 70), (4, 4), has_alibi=True, dtype=FP16),
    DecodeCase("fp8-bf16", dtype=BF16, kv_dtype=FP8),
    DecodeCase("fp8-tensor-scale", dtype=FP16, kv_dtype=FP8, scales="tensor"),
    DecodeCase("fp8-head-scale", dtype=BF16, kv_dtype=FP8, scales="head"),
    DecodeCase("fp8-by-bits", kv_dtype=FP8, scales="head", native_fp8=False),
    DecodeCase("split", (640, 5, 130), num_slots=20),
    DecodeCase("split-bf16-size80", (300,), head_size=80, dtype=BF16, num_slots=8),
    DecodeCase("positions", (40, 64, 5, 0), (4, 2, 1, 1), (40, 7, 90, 3)),
    DecodeCase("positions-alibi", (40, 64), (4, 2), (60, 64), has_alibi=True),
    DecodeCase("positions-window", (40, 64, 33), (4, 2, 3), (45, 30, 99), window=20),
    DecodeCase("first-block", (40, 200, 33), first_blocks=(1, 9, 0), window=30),
    DecodeCase("subset-positions", (64, 90), (4, 2), (64, 40), is_subset=True),
    DecodeCase("subset", (17, 64, 100, 0), is_subset=True),
    DecodeCase("subset-query4", (40, 64, 5), (4, 4, 4), is_subset=True, num_slots=8),
    _EVERY_FLAG,
    replace(_EVERY_FLAG, name="flags-all-fp8", dtype=BF16, kv_dtype=FP8, scales="head"),
]
