# SPDX-License-Identifier: Apache-2.0
"""Local attention of prefill chunks on the CPU against the same in float64.

By torch and by the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from exact_attention import exact_attention

from vllm_attn_offload.attention import cpu_scores
from vllm_attn_offload.attention.cpu_chunk import chunk_of
from vllm_attn_offload.attention.cpu_prefill import attend_locally
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.native_prefill import NativePrefill
from vllm_attn_offload.client.step_partition import Prefill
from vllm_attn_offload.native.attention import load_cpu_library
from vllm_attn_offload.protocol.geometry import LayerGeometry

Attend = Callable[..., torch.Tensor]

#: Rows of requests: decodes around and between chunks, chunks longer than a tile.
ROWS = (1, 200, 2, 1, 1, 64, 65, 7, 129, 1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["torch", "native", "native, three threads"], scope="module")
def attend(request: pytest.FixtureRequest) -> Attend:
    """Torch, or compiled kernels whose blocks hold NaN before the first chunk."""
    if request.param == "torch":
        return attend_locally
    library = load_cpu_library()
    assert library is not None
    prefill = NativePrefill(library, 1 if request.param == "native" else 3)
    prefill._blocks = torch.full((1 << 24,), 0xFF, dtype=torch.uint8)
    return prefill.attend


def _layer(
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 32,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    has_slopes: bool = False,
) -> LayerGeometry:
    slopes = tuple(2.0 ** -(head + 1) for head in range(num_heads))
    return LayerGeometry(
        name="layer",
        group=0,
        storage=0,
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        v_head_size=head_size,
        softmax_scale=head_size**-0.5,
        sliding_window=window,
        soft_cap=soft_cap,
        alibi_slopes=slopes if has_slopes else (),
    )


def _attention(layer: LayerGeometry) -> LayerAttention:
    return LayerAttention(
        layer.softmax_scale,
        sliding_window=layer.sliding_window,
        soft_cap=layer.soft_cap,
        alibi_slopes=torch.tensor(layer.alibi_slopes) if layer.alibi_slopes else None,
    )


def _qkv(
    layer: LayerGeometry, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three views of one matrix, as a fused projection makes them."""
    heads = [layer.num_query_heads, layer.num_kv_heads, layer.num_kv_heads]
    rows = torch.randn(num_tokens, sum(heads) * layer.head_size, dtype=dtype)
    q, k, v = rows.unflatten(1, (sum(heads), layer.head_size)).split(heads, 1)
    return q, k, v


def _check(
    attend: Attend,
    layer: LayerGeometry,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = ROWS,
) -> None:
    """Attend requests of ``rows`` rows at once; those of one row are no prefills."""
    q, k, v = _qkv(layer, sum(rows), dtype)
    ends = torch.tensor(rows).cumsum(0).tolist()
    spans = [(end - size, end) for end, size in zip(ends, rows, strict=True)]
    prefills = tuple(
        Prefill(begin, end, False) for begin, end in spans if end > begin + 1
    )
    output = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    lse = attend(q, k, v, output, prefills, _attention(layer))
    assert lse.dtype == torch.float32
    expected = torch.zeros(q.shape, dtype=torch.float64)
    expected_lse = torch.full(lse.shape, -torch.inf, dtype=torch.float64)
    for prefill in prefills:
        part = slice(prefill.begin, prefill.end)
        expected[part], expected_lse[part] = exact_attention(
            layer, q[part], k[part], v[part], torch.arange(part.stop - part.start)
        )
    # bf16 rounds the output, and on some CPUs the weights: half a unit is 2**-9.
    atol, rtol = (2e-5, 0.0) if dtype == torch.float32 else (2e-2, 2**-8)
    torch.testing.assert_close(output.double(), expected, atol=atol, rtol=rtol)
    # With AVX-512 torch takes a coarser exponential for bf16 than for fp32.
    atol_lse = 2e-5 if dtype == torch.float32 else 2**-13
    torch.testing.assert_close(lse.double(), expected_lse, atol=atol_lse, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 7, 64, 128, 199, 200, 201, 1000])
@pytest.mark.parametrize("kind", ["plain", "cap", "slopes", "cap-slopes"])
def test_window_cap_and_slopes(
    attend: Attend, window: int, kind: str, dtype: torch.dtype
) -> None:
    layer = _layer(
        window=window,
        soft_cap=3.0 if "cap" in kind else 0.0,
        has_slopes="slopes" in kind,
    )
    _check(attend, layer, dtype)


@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (5, 1)])
def test_heads(attend: Attend, head_size: int, heads: tuple[int, int]) -> None:
    for window, soft_cap in ((0, 0.0), (20, 0.0), (0, 5.0), (20, 5.0)):
        layer = _layer(*heads, head_size, window=window, soft_cap=soft_cap)
        _check(attend, layer, rows=(150, 1, 30))


@pytest.mark.parametrize("window", [0, 400])
def test_scores_are_held_in_tiles(attend: Attend, window: int) -> None:
    """The tiles of 32 heads are shorter than this chunk."""
    layer = _layer(32, 4, 16, window=window, soft_cap=3.0, has_slopes=True)
    row_bytes = 32 * 2 * (window or 600) * 4
    assert cpu_scores._SCORES_BYTES // row_bytes < 600
    _check(attend, layer, rows=(600,))


def test_halves(attend: Attend) -> None:
    _check(attend, _layer(), torch.float16)


def test_values_of_another_size(attend: Attend) -> None:
    """As capped and biased layers may have them in torch."""
    layer = _layer(soft_cap=3.0)
    q, k, v = _qkv(layer, 150, torch.float32)
    v = torch.randn(150, 2, 24)
    output = torch.full((150, 4, 24), torch.nan)
    prefills = (Prefill(0, 100, False), Prefill(101, 150, True))
    attend(q, k, v, output, prefills, _attention(layer))
    for prefill in prefills:
        part = slice(prefill.begin, prefill.end)
        positions = torch.arange(part.stop - part.start)
        expected, _ = exact_attention(layer, q[part], k[part], v[part], positions)
        torch.testing.assert_close(output[part].double(), expected, atol=2e-5, rtol=0)
    assert (output[100] == 0).all()


def test_random_chunks(attend: Attend) -> None:
    for _ in range(30):
        rows = torch.randint(1, 150, (4,)).tolist()
        window = int(torch.randint(0, 160, ()))
        layer = _layer(
            soft_cap=float(torch.randint(0, 2, ())) * 2.5,
            has_slopes=bool(torch.randint(0, 2, ())),
            window=window,
        )
        _check(attend, layer, rows=tuple(rows))


def test_large_scores_stay_finite(attend: Attend) -> None:
    """Whole blocks of keys are out of a row's window, or weigh nothing."""
    for options in ({"window": 7}, {"soft_cap": 1e4}, {"has_slopes": True}):
        layer = _layer(**options)
        q, k, v = _qkv(layer, 700, torch.float32)
        output = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
        prefills = (Prefill(0, 700, False),)
        lse = attend(q * 1e3, k, v, output, prefills, _attention(layer))
        assert output.isfinite().all()
        assert lse.isfinite().all()


def test_chunk_is_a_view() -> None:
    """Output and log-sum-exp of a chunk are those of the batch."""
    output, lse = torch.zeros(5, 4, 8), torch.zeros(5, 4)
    chunk = chunk_of(*_qkv(_layer(head_size=8), 5, torch.float32), output, lse)
    chunk.output[1, 0, 2] = 1
    chunk.lse[1, 1, 4] = 2
    assert (output[2, 2] == 1).all()
    assert output.sum() == 8
    assert lse[4, 3] == lse.sum() == 2
