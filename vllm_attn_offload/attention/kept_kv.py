# SPDX-License-Identifier: Apache-2.0
"""k and v that prefills attend to on the compute node, and those that layers share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_attn_offload.attention.layer_exchange import Qkv
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.protocol.e4m3 import round_to_e4m3
from vllm_attn_offload.protocol.geometry import SessionGeometry


def _at_once(copy: Callable[[], object]) -> None:
    copy()


class KeptKV:
    """Finds the k and v that a prefill attends to on the compute node.

    They are what the nodes store, so that a token does not depend on where a prompt is
    cut, nor on what of it is cached.

    Args:
        geometry: The worker's layers; those without ``stores`` name in ``storage``
            whose KV they share.
        launch: Enqueues what copies tensors, on a GPU.
    """

    def __init__(
        self,
        geometry: SessionGeometry,
        launch: Callable[[Callable[[], object]], None] = _at_once,
    ) -> None:
        self._layers = geometry.layers
        self._rounds = geometry.kv_dtype is not None
        self._launch = launch
        self._is_shared = {
            (layer.group, layer.storage)
            for layer in geometry.layers
            if not layer.stores
        }

    def local_kv(
        self, metadata: AttentionOffloadMetadata, layer: int, qkv: Qkv
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v of the step's rows: the layer's own, or those that it shares.

        Args:
            metadata: The step of the layer's group; keeps what is shared.
            layer: Index of the layer.
            qkv: As the layer got them; k and v are None where it stores none.

        Returns:
            ``[num_tokens, num_kv_heads, size]`` each, in units of the layer's scales.
        """
        shape = self._layers[layer]
        is_shared = (shape.group, shape.storage) in self._is_shared
        if is_shared and not shape.stores:
            return metadata.kept[shape.storage]
        _, key, value = qkv
        assert key is not None
        assert value is not None
        if not is_shared and not self._rounds:
            return key, value
        # Copies: what is compiled may use the memory again after this layer.
        kept = self._copy(key, shape.k_scale), self._copy(value, shape.v_scale)
        if is_shared:
            metadata.kept[shape.storage] = kept
        return kept

    def _copy(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        """Copy k or v, rounded as in blocks; any dtype has every number of fp8."""
        copy = torch.empty_like(rows, memory_format=torch.contiguous_format)
        if self._rounds:
            self._launch(lambda: round_to_e4m3(rows, scale, copy))
        else:
            self._launch(lambda: copy.copy_(rows))
        return copy
