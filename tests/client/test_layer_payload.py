# SPDX-License-Identifier: Apache-2.0
"""Bytes of q, k and v: in place where the model allows it, right anywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_attn_offload.client.layer_payload import LayerPayload

HEADS, KV_HEADS, SIZE = 9, 3, 64
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Buffers:
    """Two buffers in turns, as a transport with two slots."""

    def __init__(self) -> None:
        self._slots = [bytearray(1 << 16), bytearray(1 << 16)]
        self._views: dict[tuple[int, int], memoryview] = {}
        self.turn = 0

    def __call__(self, num_bytes: int) -> memoryview:
        self.turn = 1 - self.turn
        key = (self.turn, num_bytes)
        slot = memoryview(self._slots[self.turn])
        return self._views.setdefault(key, slot[:num_bytes])


def split(rows: torch.Tensor) -> Parts:
    """q, k, v as views of fused rows, with a dimension for the heads."""
    q, k, v = (part.unflatten(1, (-1, SIZE)) for part in rows.split(WIDTHS, dim=1))
    return q, k, v


def fused_rows(num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_tokens, sum(WIDTHS)).to(dtype)


def as_tensor(data: memoryview, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype)


def flat(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_fused_copies_nothing(num_tokens: int, dtype: torch.dtype) -> None:
    rows = fused_rows(num_tokens + 2, dtype)
    # As in a batch that is padded to a captured graph's size.
    q, k, v = (part[:num_tokens] for part in split(rows))
    fused = LayerPayload().fused(q, k, v)
    assert fused is not None
    assert as_tensor(fused, dtype).data_ptr() == rows.data_ptr()
    assert torch.equal(as_tensor(fused, dtype), rows[:num_tokens].flatten())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, k, v: (q, v, k),
        lambda q, k, v: (q, k, k),
        lambda q, k, v: (q.clone(), k.clone(), v),
        lambda q, k, v: (q, k[:, :, ::2].repeat_interleave(2, 2), v),
        lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
        lambda q, k, v: tuple(part[:1].expand(4, -1, -1) for part in (q, k, v)),
    ],
    ids=["swapped", "k twice", "copies", "strided k", "transposed q", "one row"],
)
def test_almost_fused(spoil: Callable[..., Parts]) -> None:
    """After rotary embedding q and k are often new tensors, v a view of the rows."""
    q, k, v = spoil(*split(fused_rows(4)))
    payload = LayerPayload()
    assert payload.fused(q, k, v) is None
    planar = payload.planar((q, k, v), (None, None, None), Buffers())
    assert torch.equal(as_tensor(planar), flat(q, k, v))


def test_planar_picks_rows_and_heads() -> None:
    q, k, v = split(fused_rows(5))
    payload = LayerPayload(slice(3, 6), slice(1, 2))
    assert payload.fused(q, k, v) is None
    rows, stored = torch.tensor([1, 4]), torch.tensor([0, 2, 3])
    planar = payload.planar((q, k, v), (rows, stored, stored), Buffers())
    expected = flat(q[rows, 3:6], k[stored, 1:2], v[stored, 1:2])
    assert torch.equal(as_tensor(planar), expected)
    nothing = torch.tensor([], dtype=torch.int64)
    no_keys = payload.planar((q, k, v), (rows, nothing, nothing), Buffers())
    assert torch.equal(as_tensor(no_keys), q[rows, 3:6].flatten())
    assert not payload.planar((q, k, v), (nothing,) * 3, Buffers()).nbytes


def test_planar_writes_to_the_buffer_it_got() -> None:
    buffers, payload = Buffers(), LayerPayload()
    for num_tokens in (4, 4, 4, 2, 4, 2):
        parts = [part.clone() for part in split(fused_rows(num_tokens))]
        planar = payload.planar(tuple(parts), (None,) * 3, buffers)
        assert planar is buffers._views[buffers.turn, planar.nbytes]
        assert torch.equal(as_tensor(planar), flat(*parts))
