# SPDX-License-Identifier: Apache-2.0
"""What a worker allocates itself of a KV cache that memory nodes hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from vllm_attn_offload.worker.resident_state import ResidentStateSpec, aligned


@dataclass
class LocalKVCacheConfig(KVCacheConfig):
    """One block for all layers that attend, because vLLM cannot allocate none, and all
    states of the others behind it.

    Nothing reads or writes the block. The scheduler keeps its own configuration.
    """

    @classmethod
    def of(cls, config: KVCacheConfig) -> LocalKVCacheConfig:
        """Shrink the pool of ``config`` to a block, and give states their own place.

        Args:
            config: A rank's part of the pool, as vLLM planned it.
        """
        given = {field.name: getattr(config, field.name) for field in fields(config)}
        local = cls(**copy.deepcopy(given))
        local.num_blocks = 1
        states = local._state_specs()
        local.kv_cache_tensors = [
            _one_block(tensor, config.num_blocks)
            for tensor in local.kv_cache_tensors
            if tensor.layers[0] not in states
        ]
        local._add_states()
        return local

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return sum(
            spec.state_bytes * spec.pool_size for spec in self._state_specs().values()
        )

    def smallest_pool(self, num_blocks: int) -> int:
        """Return ``num_blocks``, or the states of layers that have fewer."""
        states = [spec.pool_size for spec in self._state_specs().values()]
        return min([num_blocks, *states])

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Blocks, or states, of the tensor's layers."""
        spec = self._state_specs().get(tensor.layers[0])
        return 1 if spec is None else spec.pool_size

    def _state_specs(self) -> dict[str, ResidentStateSpec]:
        return {
            name: group.kv_cache_spec
            for group in self.kv_cache_groups
            if isinstance(group.kv_cache_spec, ResidentStateSpec)
            for name in group.layer_names
        }

    def _add_states(self) -> None:
        end = aligned(self.kv_cache_tensors[0].size)
        for group in self.kv_cache_groups:
            spec = group.kv_cache_spec
            if not isinstance(spec, ResidentStateSpec):
                continue
            group.kv_cache_spec = replace(spec, page_size_padded=spec.state_bytes)
            layer_bytes = spec.state_bytes * spec.pool_size
            self.kv_cache_tensors.append(
                KVCacheTensor(
                    size=0,
                    layers=group.layer_names,
                    layer_stride=layer_bytes,
                    block_stride=spec.state_bytes,
                    offset=end,
                )
            )
            end += layer_bytes * len(group.layer_names)
        # All of them are one allocation.
        self.kv_cache_tensors = [replace(t, size=end) for t in self.kv_cache_tensors]


def _one_block(tensor: KVCacheTensor, num_blocks: int) -> KVCacheTensor:
    # Layer-outermost layouts give each layer a region of num_blocks pages.
    is_layer_outermost = tensor.layer_stride > tensor.block_stride
    return replace(
        tensor,
        size=tensor.size // num_blocks,
        offset=tensor.offset // num_blocks,
        layer_stride=tensor.layer_stride // num_blocks
        if is_layer_outermost
        else tensor.layer_stride,
    )
