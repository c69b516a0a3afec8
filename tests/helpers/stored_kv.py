# SPDX-License-Identifier: Apache-2.0
"""Sessions with blocks of fp8, and what these hold of k and v."""

from __future__ import annotations

import msgspec
import torch

from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry

#: Of the first storage; no powers of two. The largest values of random tokens saturate.
K_SCALE, V_SCALE = 0.037, 0.006
E4M3_MAX = 448.0


def with_fp8(geometry: SessionGeometry) -> SessionGeometry:
    """The same layers over blocks of fp8; each storage has scales of its own."""
    layers = [
        msgspec.structs.replace(
            layer,
            k_scale=_in_fp32(K_SCALE * (1 + layer.storage / 4)),
            v_scale=_in_fp32(V_SCALE * (1 + layer.storage / 8)),
        )
        for layer in geometry.layers
    ]
    return msgspec.structs.replace(geometry, layers=layers, kv_dtype="fp8_e4m3")


def stored_kv(
    geometry: SessionGeometry,
    layer: LayerGeometry,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v as blocks hold them, in float64; any shapes."""
    if geometry.kv_dtype is None:
        return key.double(), value.double()
    return _from_fp8(key, layer.k_scale), _from_fp8(value, layer.v_scale)


def _from_fp8(rows: torch.Tensor, scale: float) -> torch.Tensor:
    numbers = (rows.float() / torch.tensor(scale)).clamp(-E4M3_MAX, E4M3_MAX)
    return numbers.to(torch.float8_e4m3fn).double() * scale


def _in_fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()
