# SPDX-License-Identifier: Apache-2.0
"""Two micro-batches of one session, whose steps and layers alternate."""

from __future__ import annotations

from contextlib import closing

import torch
from paged_batch import PagedBatch, max_error
from raw_session import RawSession, as_bytes, encode_step, make_geometry

from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind

NUM_BLOCKS = 64


def assert_micro_batches_are_exact(
    address: str,
    steps: list[list[int]],
    *,
    is_shared: bool = False,
    flags: int = 0,
) -> None:
    """Send both STEP frames before a layer of either.

    Args:
        address: The memory node.
        steps: Tokens that each of two requests adds per step, in both micro-batches.
        is_shared: As for `RawSession`.
        flags: Of the STEP frames.
    """
    geometry = make_geometry()
    batches = [PagedBatch(geometry, NUM_BLOCKS, 2, seed) for seed in (0, 1)]
    with closing(
        RawSession(address, geometry, NUM_BLOCKS, is_shared=is_shared)
    ) as session:
        for number, num_new in enumerate(steps, 1):
            rows = []
            for index, batch in enumerate(batches):
                step, qkv = batch.grow(num_new)
                payload = encode_step(step)
                header = FrameHeader(FrameKind.STEP, step=number, micro_batch=index)
                header.num_bytes, header.flags = payload.nbytes, flags
                session.send(header, payload)
                rows.append(qkv)
            # Each on its own layer, hence in blocks of its own.
            for index, (batch, qkv) in enumerate(zip(batches, rows, strict=True)):
                header = FrameHeader(FrameKind.LAYER, layer=index, step=number)
                header.micro_batch, header.num_bytes = index, qkv.nbytes
                header.flags = FrameFlag.FUSED
                session.send(header, as_bytes(qkv))
                kind, reply = session.receive()
                assert kind == FrameKind.OUT, reply
                exact, _ = batch.expected(torch.float64)
                found = torch.frombuffer(bytearray(reply), dtype=torch.float32)
                assert max_error(found.view(exact.shape), exact) < 1e-5
