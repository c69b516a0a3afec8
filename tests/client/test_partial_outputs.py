# SPDX-License-Identifier: Apache-2.0
"""Parts of attention become the whole: merges and sinks against float64."""

from __future__ import annotations

import pytest
import torch

from vllm_attn_offload.client.partial_outputs import (
    PartialOutputs,
    apply_sinks,
    merge_remote,
)

ROWS, HEADS, SIZE, KEYS = 24, 6, 16, 30
DTYPES = [torch.float32, torch.bfloat16]


class Parts:
    """Scores and values of some keys, divided between parts at random.

    Some rows see no key in some parts, row 0 in none, and row 1 in the first alone.

    Args:
        num_parts: How many.
        dtype: Of the parts' outputs.
    """

    def __init__(self, num_parts: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(num_parts)
        self.dtype = dtype
        self.scores = 30 * torch.randn(
            ROWS, HEADS, KEYS, generator=generator, dtype=torch.float64
        )
        self.value = torch.randn(HEADS, KEYS, SIZE, generator=generator).double()
        home = torch.randint(0, num_parts + 1, (ROWS, 1, KEYS), generator=generator)
        home[0], home[1] = num_parts, 0
        self.seen = [home == part for part in range(num_parts)]
        self.sinks = 30 * torch.randn(HEADS, generator=generator)

    def whole(self, sinks: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Output and log-sum-exp over the keys of all parts."""
        return self._attend(torch.stack(self.seen).any(0), sinks)

    def part(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of one part, as a node or the kernel gives them."""
        out, lse = self._attend(self.seen[index], None)
        return out.to(self.dtype), lse.float()

    def _attend(
        self, seen: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        total = lse if sinks is None else torch.logaddexp(lse, sinks.double())
        shift = total.masked_fill(total == -torch.inf, 0.0)
        weights = (scores - shift.unsqueeze(-1)).exp()
        return torch.einsum("rhk,hkd->rhd", weights, self.value), lse


def _assert_whole(parts: Parts, output: torch.Tensor, sinks: bool) -> None:
    expected, _ = parts.whole(parts.sinks if sinks else None)
    # Parts and the merged output are rounded, and what a sink leaves of it once more.
    atol = 1e-5 if parts.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(output.double(), expected, atol=atol, rtol=0)
    assert not output[0].any()


def _assert_lse(parts: Parts, lse: torch.Tensor) -> None:
    _, expected = parts.whole()
    torch.testing.assert_close(lse.double(), expected, atol=2e-5, rtol=0)
    assert lse[0].isneginf().all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_parts_of_nodes(num_parts: int, dtype: torch.dtype, sinks: bool) -> None:
    parts = Parts(num_parts, dtype)
    partials = PartialOutputs(num_parts, ROWS, HEADS, SIZE, dtype)
    for index in range(num_parts):
        out, lse = parts.part(index)
        partials.out[index], partials.lse[index] = out, lse
    output = torch.full((ROWS, HEADS, SIZE), torch.nan, dtype=dtype)
    merged_lse = torch.full((ROWS, HEADS), torch.nan)
    partials.merge_into(output, None)
    _assert_whole(parts, output, sinks=False)
    output.fill_(torch.nan)
    partials.merge_into(output, merged_lse)
    _assert_lse(parts, merged_lse)
    if sinks:
        apply_sinks(output, merged_lse, parts.sinks)
    _assert_whole(parts, output, sinks)


def test_node_without_rows_weighs_nothing() -> None:
    parts = Parts(2, torch.float32)
    partials = PartialOutputs(3, ROWS, HEADS, SIZE, torch.float32)
    for index in range(2):
        partials.out[index], partials.lse[index] = parts.part(index)
    output, lse = torch.empty(ROWS, HEADS, SIZE), torch.empty(ROWS, HEADS)
    partials.merge_into(output, lse)
    _assert_whole(parts, output, sinks=False)
    _assert_lse(parts, lse)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("some_rows", [False, True])
def test_local_and_remote_part(
    some_rows: bool, dtype: torch.dtype, sinks: bool
) -> None:
    """Rows that are not remote keep the local part, in which they see all."""
    parts = Parts(2, dtype)
    rows = torch.arange(0, ROWS, 2) if some_rows else None
    if rows is not None:
        parts.seen[1][1::2] = False
    output, lse = parts.part(0)
    remote, remote_lse = parts.part(1)
    if rows is not None:
        remote, remote_lse = remote[rows], remote_lse[rows]
    merge_remote(output, lse, remote, remote_lse, rows)
    _assert_lse(parts, lse)
    if sinks:
        apply_sinks(output, lse, parts.sinks)
    _assert_whole(parts, output, sinks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_of_every_size(dtype: torch.dtype) -> None:
    """From one that takes all weight to one that takes none; their type is any."""
    sinks = torch.tensor([-1e30, -200.0, 0.0, 4.0, 200.0, 1e30], dtype=dtype)
    lse = torch.tensor([-torch.inf, -1e4, 0.0, 4.0, 1e4]).unsqueeze(1).repeat(1, HEADS)
    output = torch.ones(5, HEADS, SIZE, dtype=dtype)
    output[0] = 0
    apply_sinks(output, lse, sinks)
    share = 1 / (1 + (sinks.double() - lse.double()).exp())
    expected = share.unsqueeze(-1).expand(output.shape)
    torch.testing.assert_close(output.double(), expected, atol=2**-9, rtol=0)


def test_sinks_do_not_depend_on_the_partition() -> None:
    """Halves of the keys, merged by either function, and all keys at once agree."""
    parts = Parts(2, torch.float32)
    (output, lse), (remote, remote_lse) = parts.part(0), parts.part(1)
    partials = PartialOutputs(2, ROWS, HEADS, SIZE, torch.float32)
    partials.out[0], partials.lse[0] = output, lse
    partials.out[1], partials.lse[1] = remote, remote_lse
    other, other_lse = torch.empty_like(output), torch.empty_like(lse)
    partials.merge_into(other, other_lse)
    merge_remote(output, lse, remote, remote_lse, None)
    for merged, merged_lse in ((output, lse), (other, other_lse)):
        apply_sinks(merged, merged_lse, parts.sinks)
        _assert_whole(parts, merged, sinks=True)
