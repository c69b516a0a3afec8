# SPDX-License-Identifier: Apache-2.0
"""New k and v of layers whose KV later layers share, as long as a step lasts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_attn_offload.attention.layer_exchange import Qkv
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.protocol.geometry import SessionGeometry


def _at_once(copy: Callable[[], object]) -> None:
    copy()


class KeptKV:
    """Finds the k and v that a prefill attends to on the compute node.

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
            ``[num_tokens, num_kv_heads, size]`` each.
        """
        place = self._layers[layer].group, self._layers[layer].storage
        _, key, value = qkv
        if place not in self._is_shared:
            assert key is not None
            assert value is not None
            return key, value
        if self._layers[layer].stores:
            assert key is not None
            assert value is not None
            # Copies: what is compiled may use the memory again after this layer.
            kept = torch.empty_like(key), torch.empty_like(value)
            self._launch(lambda: kept[0].copy_(key))
            self._launch(lambda: kept[1].copy_(value))
            metadata.kept[place[1]] = kept
        return metadata.kept[place[1]]
