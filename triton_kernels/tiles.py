# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the decode-attention kernel by architecture, head size and group.

A table instead of autotuning: a key that contains a length or a batch size is tuned
again for every new value, in the middle of serving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Launch shape of one CTA of the decode-attention kernel."""

    block_m: int
    """Query rows (query tokens x query heads of one KV head) per CTA."""
    block_n: int
    """KV tokens per iteration."""
    num_warps: int
    num_stages: int
    """Triton's pipeline depth: one stage fetches block ids, one computes, the rest
    are KV tiles in flight."""
    ctas_per_sm: int
    """CTAs of this shape that fit on one SM: the planner fills this many."""
    native_fp8: bool = True
    """Whether the architecture converts e4m3 in hardware (sm_89 and later)."""


# (architecture, largest head size of the row, query rows) -> tile for a 2-byte cache.
# Shared memory per SM is 164 KiB on sm_80 and 228 KiB on sm_90 and sm_100. Two or
# more CTAs should fit, because one cannot keep enough loads in flight to cover the
# latency of HBM; accumulators of 32 rows x 256 or more leave registers for one only.
# Block ids are loaded in the pipeline too, so stages 3 keep one tile of K and V in
# flight, 5 keep two and 7 three.
_TABLE: dict[tuple[str, int, int], DecodeTile] = {
    ("sm_80", 64, 16): DecodeTile(16, 64, 4, 4, 4),
    ("sm_80", 64, 64): DecodeTile(64, 64, 4, 4, 2),
    ("sm_80", 80, 16): DecodeTile(16, 32, 4, 5, 3),
    ("sm_80", 80, 64): DecodeTile(64, 32, 4, 3, 2),
    ("sm_80", 128, 16): DecodeTile(16, 64, 4, 3, 3),
    ("sm_80", 128, 64): DecodeTile(64, 32, 4, 3, 2),
    ("sm_80", 256, 16): DecodeTile(16, 32, 4, 3, 2),
    ("sm_80", 256, 64): DecodeTile(32, 32, 8, 3, 1),
    ("sm_80", 576, 16): DecodeTile(16, 32, 4, 3, 2),
    ("sm_80", 576, 64): DecodeTile(32, 32, 8, 3, 1),
    ("sm_90", 64, 16): DecodeTile(16, 64, 4, 5, 4),
    ("sm_90", 64, 64): DecodeTile(64, 64, 4, 5, 2),
    ("sm_90", 80, 16): DecodeTile(16, 32, 4, 5, 3),
    ("sm_90", 80, 64): DecodeTile(64, 32, 4, 5, 2),
    ("sm_90", 128, 16): DecodeTile(16, 64, 4, 5, 3),
    ("sm_90", 128, 64): DecodeTile(64, 32, 4, 5, 2),
    ("sm_90", 256, 16): DecodeTile(16, 32, 4, 5, 2),
    ("sm_90", 256, 64): DecodeTile(32, 32, 8, 3, 1),
    ("sm_90", 576, 16): DecodeTile(16, 32, 4, 5, 2),
    ("sm_90", 576, 64): DecodeTile(32, 32, 8, 3, 1),
}
_INTERPRETER_TILE = DecodeTile(16, 64, 4, 1, 1)


def split_head_size(head_size: int) -> tuple[int, int]:
    """Write a head size as a power of two plus 0 or a smaller one, as 576 = 512 + 64.

    Tiles must be powers of two; two of them read no padding.

    Raises:
        ValueError: the size is no such sum, or a part is below 16.
    """
    block = 1 << (head_size.bit_length() - 1)
    tail = head_size - block
    if head_size < 16 or (tail and (tail < 16 or tail & (tail - 1))):
        raise ValueError(
            f"head_size={head_size}; the kernels take a power of two from 16, or the "
            "sum of two, as 80, 96, 192 and 576. Run this model without offloading."
        )
    return block, tail


def architecture_of(device: torch.device) -> str:
    """The table row for a device: ``interpreter`` for the CPU, else ``sm_*``.

    Raises:
        ValueError: the GPU is older than sm_80.
    """
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"{device} is sm_{major}{minor}; the kernels need sm_80 or later. "
            "Run the memory node on a newer GPU or with --device cpu."
        )
    return f"sm_{major}{minor}"


def _table_architecture(architecture: str) -> tuple[str, bool]:
    """The table's architecture for a GPU, and whether it converts e4m3 itself."""
    number = int(architecture.removeprefix("sm_"))
    # sm_86, sm_89 and sm_12x have 100 KiB of shared memory per SM or so: they take
    # the smaller tiles of sm_80.
    large_shared_memory = number in (90, 100, 103, 110)
    return ("sm_90" if large_shared_memory else "sm_80"), number >= 89


def choose_decode_tile(
    architecture: str, head_size: int, num_rows: int, kv_element_size: int
) -> DecodeTile:
    """Pick the tile for a geometry; never depends on lengths or the batch.

    Args:
        architecture: ``interpreter`` or ``sm_NN``.
        head_size: size of a key, the larger of key and value.
        num_rows: most query rows of one KV head and request
            (query length x heads per KV head).
        kv_element_size: bytes of one cached number: 1, 2 or 4.
    """
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    if architecture == "interpreter":
        tile = _INTERPRETER_TILE
        return DecodeTile(block_m, tile.block_n, tile.num_warps, tile.num_stages, 1)
    table, native_fp8 = _table_architecture(architecture)
    sizes = sorted({size for name, size, _ in _TABLE if name == table})
    row = next((size for size in sizes if head_size <= size), sizes[-1])
    tile = _TABLE[table, row, 16 if block_m == 16 else 64]
    block_n, num_warps = tile.block_n, tile.num_warps
    if kv_element_size == 4:
        # Full-precision products run on the plain cores: registers, not shared
        # memory, are short, so halve the tile and spread it over more warps.
        block_n, num_warps = max(16, block_n // 2), 8
    if kv_element_size == 1 and head_size > 256:
        # Converted keys live in registers; a whole tile of them would spill.
        block_n //= 2
    # The same tile of fp8 is half the bytes: one more in flight.
    extra_stages = 2 if kv_element_size == 1 else 0
    return DecodeTile(
        block_m=min(block_m, tile.block_m),
        block_n=block_n,
        num_warps=num_warps,
        num_stages=tile.num_stages + extra_stages,
        ctas_per_sm=tile.ctas_per_sm,
        native_fp8=native_fp8,
    )
