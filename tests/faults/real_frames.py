# SPDX-License-Identifier: Apache-2.0
"""Right STEP and LAYER frames of a small session: what fuzz tests break."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import torch
from paged_batch import PagedBatch
from raw_session import encode_step, make_geometry, make_hybrid_geometry

from vllm_attn_offload.protocol.frames import (
    FRAME_HEADER_BYTES,
    FrameFlag,
    FrameHeader,
    FrameKind,
)
from vllm_attn_offload.protocol.geometry import LayerGeometry
from vllm_attn_offload.protocol.step import StepMetadata

NUM_BLOCKS = 8
GEOMETRY = make_geometry(num_query_heads=4, num_kv_heads=2, head_size=16, block_size=16)
# The second layer has all that a layer can have; what it answers does not count here.
GEOMETRY.layers[1] = msgspec.structs.replace(
    GEOMETRY.layers[1],
    sliding_window=7,
    soft_cap=2.0,
    alibi_slopes=(0.5, 0.25, 0.125, 0.0625),
)
LONGEST = 1 << 30
HYBRID = make_hybrid_geometry()


def frame(header: FrameHeader, payload: memoryview) -> bytes:
    header.num_bytes = payload.nbytes
    packed = bytearray(FRAME_HEADER_BYTES)
    header.pack_into(packed)
    return bytes(packed) + bytes(payload)


def layers(step: int, qkv: torch.Tensor, flags: int) -> list[bytes]:
    payload = qkv.contiguous().view(torch.uint8).numpy().data.cast("B")
    return [
        frame(FrameHeader(FrameKind.LAYER, layer, step, flags=flags), payload)
        for layer in (0, 1)
    ]


def real_frames() -> list[bytes]:
    """Two steps of two requests: prefill and decode, stored only and attended."""
    batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 2)
    frames = []
    for number, num_new in enumerate(([5, 3], [1, 1]), 1):
        step, qkv = batch.grow(num_new)
        frames.append(
            frame(FrameHeader(FrameKind.STEP, step=number), encode_step(step))
        )
        for flags in (FrameFlag.FUSED, FrameFlag.FUSED | FrameFlag.WANT_LSE):
            frames += layers(number, qkv, flags)
        frames += layers(number, qkv, FrameFlag.NONE)
        stored = StepMetadata.whole(
            step.query_start_loc[:1],
            step.seq_lens[:0],
            step.slot_mapping,
            step.block_table[:0],
        )
        header = FrameHeader(FrameKind.STEP, step=10 + number)
        frames.append(frame(header, encode_step(stored)))
        kv = qkv[:, 4 * 16 :]
        frames += layers(10 + number, kv, FrameFlag.WANT_ACK)
        frames += layers(10 + number, kv, FrameFlag.NONE)
    return frames


def edge_frames() -> list[bytes]:
    """Steps at, and behind, the edge: lengths, repeated ids, wide tables."""
    frames, number = [], 1
    for micro_batch, (num_reqs, width, seq_len) in enumerate(
        [(64, 64, 16 * NUM_BLOCKS), (1, 64, 16 * NUM_BLOCKS + 1), (64, 1, 0)]
    ):
        step = StepMetadata.whole(
            query_start_loc=np.arange(num_reqs + 1, dtype=np.int32),
            seq_lens=np.full(num_reqs, seq_len, np.int32),
            slot_mapping=np.full(num_reqs, -1, np.int64),
            block_table=np.full((num_reqs, width), NUM_BLOCKS - 1, np.int32),
        )
        header = FrameHeader(FrameKind.STEP, step=20 + number, micro_batch=micro_batch)
        frames.append(frame(header, encode_step(step)))
        frames += layers(20 + number, torch.zeros(num_reqs, 8 * 16), FrameFlag.FUSED)
    for micro_batch, step in enumerate(late_steps()):
        header = FrameHeader(FrameKind.STEP, step=30, micro_batch=micro_batch)
        frames.append(frame(header, encode_step(step)))
        frames += layers(30, torch.zeros(1, 8 * 16), FrameFlag.FUSED)
    return frames


def late_steps() -> tuple[StepMetadata, StepMetadata]:
    """The last row of the longest request: its table begins late, or has indices."""
    one = np.ones(1, np.int32)
    last_block = LONGEST // 16 - 1
    late = StepMetadata(
        query_start_loc=np.array([0, 1], np.int32),
        seq_lens=LONGEST * one,
        slot_mapping=np.full(1, -1, np.int64),
        block_table=np.full((1, 2), NUM_BLOCKS - 1, np.int32),
        query_positions=(LONGEST - 1) * one,
        first_block=(last_block - 1) * one,
    )
    indices = np.array([[0, last_block]], np.int32)
    return late, replace(late, first_block=0 * one, block_indices=indices)


def hybrid_frames() -> list[bytes]:
    """Two steps of two KV groups, one of whose layers only reads."""
    blocks = ([1, 3, 5, 7], [0, 2, 4, 6])
    batches = [
        PagedBatch(HYBRID, NUM_BLOCKS, 2, group=group, blocks=blocks[group])
        for group in (0, 1)
    ]
    frames = []
    for number, num_new in enumerate(([5, 3], [1, 1]), 1):
        for group, batch in enumerate(batches):
            step, qkv = batch.grow(num_new)
            header = FrameHeader(FrameKind.STEP, step=number, group=group)
            frames.append(frame(header, encode_step(step)))
            for index, layer in enumerate(HYBRID.layers):
                if layer.group == group:
                    frames.append(_hybrid_layer(number, index, layer, qkv))
    return frames


def _hybrid_layer(
    step: int, index: int, layer: LayerGeometry, qkv: torch.Tensor
) -> bytes:
    flags, rows = FrameFlag.FUSED | FrameFlag.WANT_LSE, qkv
    if not layer.stores:
        flags = FrameFlag.WANT_LSE
        rows = qkv[:, : layer.num_query_heads * layer.head_size]
    payload = rows.contiguous().view(torch.uint8).numpy().data.cast("B")
    return frame(FrameHeader(FrameKind.LAYER, index, step, flags=flags), payload)


FRAMES = real_frames()
EDGE_FRAMES = edge_frames()
HYBRID_FRAMES = hybrid_frames()
