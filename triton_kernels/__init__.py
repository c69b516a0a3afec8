# SPDX-License-Identifier: Apache-2.0
"""Decode-attention kernels of memory nodes; imports torch and triton only."""

from .decode_plan import DecodeAttentionPlan, plan_decode_attention
from .paged_decode_attention import (
    paged_decode_attention,
    prepare_decode_attention,
)
from .prepared_launch import PreparedLaunch
from .store_kv import prepare_store_kv, store_kv

__all__ = [
    "DecodeAttentionPlan",
    "PreparedLaunch",
    "paged_decode_attention",
    "plan_decode_attention",
    "prepare_decode_attention",
    "prepare_store_kv",
    "store_kv",
]
