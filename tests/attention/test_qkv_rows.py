# SPDX-License-Identifier: Apache-2.0
"""Bytes of q, k, v and output: in place where the model allows it, right anywhere."""

from __future__ import annotations

import pytest
import torch

from vllm_attn_offload.attention.qkv_rows import QKVRows

HEADS, KV_HEADS, SIZE = 9, 3, 64
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]


def split(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of fused rows, with a dimension for the heads."""
    return tuple(part.unflatten(1, (-1, SIZE)) for part in rows.split(WIDTHS, dim=1))


def fused_rows(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_tokens, sum(WIDTHS)).to(dtype)


def as_tensor(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).view(-1, sum(WIDTHS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_pack_fused_copies_nothing(num_tokens: int, dtype: torch.dtype) -> None:
    rows = fused_rows(num_tokens + 2, dtype)
    # As in a batch that is padded to a captured graph's size.
    q, k, v = (part[:num_tokens] for part in split(rows))
    packed = as_tensor(QKVRows().pack(q, k, v), dtype)
    assert packed.data_ptr() == rows.data_ptr()
    assert torch.equal(packed, rows[:num_tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_pack_separate_tensors(num_tokens: int, dtype: torch.dtype) -> None:
    """After rotary embedding q and k are often new tensors, v a view of the rows."""
    rows = fused_rows(num_tokens, dtype)
    q, k, v = split(rows)
    packed = QKVRows().pack(q.clone(), k.clone(), v)
    assert torch.equal(as_tensor(packed, dtype), rows)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, k, v: (q, v, k),
        lambda q, k, v: (q, k, k),
        lambda q, k, v: (q.flip(0), k, v),
        lambda q, k, v: (q, k[:, :, ::2].repeat_interleave(2, 2), v),
        lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
        lambda q, k, v: (q.expand(4, HEADS, SIZE), k, v),
    ],
    ids=["swapped", "k twice", "flipped", "strided k", "transposed q", "same values"],
)
def test_pack_almost_fused(spoil: object) -> None:
    assert callable(spoil)
    q, k, v = spoil(*split(fused_rows(4, torch.float32)))
    expected = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
    assert torch.equal(as_tensor(QKVRows().pack(q, k, v), torch.float32), expected)


def test_pack_expanded_row() -> None:
    """One row for every token has a stride of 0 and must not be taken as fused."""
    q, k, v = (part.expand(4, -1, -1) for part in split(fused_rows(1, torch.float32)))
    expected = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
    assert torch.equal(as_tensor(QKVRows().pack(q, k, v), torch.float32), expected)


def test_pack_keeps_its_buffer() -> None:
    rows = QKVRows()
    q, k, v = (part.clone() for part in split(fused_rows(8, torch.float32)))
    first = as_tensor(rows.pack(q, k, v), torch.float32)
    second = as_tensor(rows.pack(k.new_ones(3, HEADS, SIZE), k[:3], v[:3]), q.dtype)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second[:, : WIDTHS[0]], torch.ones(3, WIDTHS[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_output(dtype: torch.dtype, is_contiguous: bool) -> None:
    wide = torch.zeros(5, HEADS, SIZE if is_contiguous else 2 * SIZE, dtype=dtype)
    output = wide[:, :, :SIZE]
    reply = torch.randn(5, HEADS, SIZE).to(dtype)
    rows = QKVRows()
    target = rows.output_bytes(output)
    assert target.nbytes == reply.nbytes
    target[:] = reply.view(torch.uint8).numpy().data.cast("B")
    rows.finish(output)
    assert torch.equal(output, reply)
    assert torch.count_nonzero(wide[:, :, SIZE:]) == 0
