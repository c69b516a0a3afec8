# SPDX-License-Identifier: Apache-2.0
"""Decode-attention kernels of memory nodes; imports torch and triton only."""

from .decode_plan import DecodeAttentionPlan, plan_decode_attention
from .paged_decode_attention import paged_decode_attention
from .store_kv import store_kv

__all__ = [
    "DecodeAttentionPlan",
    "paged_decode_attention",
    "plan_decode_attention",
    "store_kv",
]
