# SPDX-License-Identifier: Apache-2.0
"""Sizes the pool of recurrent states that a hybrid model keeps on the compute node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.args import data_parallel_size
from vllm_attn_offload.engine.pool_size import round_up_gib
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.memory_node.launcher import unpromised_host_bytes
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.messages import GIB
from vllm_attn_offload.worker.resident_state import (
    ResidentStateSpec,
    state_bytes,
    states_per_request,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

    LayerSpecs = dict[str, KVCacheSpec]

logger = get_logger(__name__)

#: Of the free memory, where no size is given: steps need memory, too.
_FREE_SHARE = 0.5
#: With prefix caching, this many times what running requests hold: the rest is for
#: states of prefixes, without which their KV on the nodes is of no use.
_CACHED_SHARE = 4


class StatePool:
    """Recurrent states of an engine, sized once, when the first specs are known.

    Args:
        vllm_config: The engine's configuration.
        device_bytes: Asks the ranks for the free memory of their GPUs.
    """

    def __init__(
        self, vllm_config: VllmConfig, device_bytes: Callable[[], list[int]]
    ) -> None:
        self._vllm_config = vllm_config
        self._device_bytes = device_bytes
        self._size: int | None = None

    def place(self, specs: list[LayerSpecs]) -> list[LayerSpecs]:
        """Give layers with recurrent states a pool of their own.

        Args:
            specs: Of each rank's layers, by name.

        Raises:
            ValueError: The compute node has no memory for the states, or vLLM's kernels
                do not keep them.
        """
        if not any(_state_specs(layers) for layers in specs):
            return specs
        if self._size is None:
            _check_kernels(specs)
            config = AttentionOffloadConfig.of_engine(self._vllm_config)
            self._size = choose_pool_size(
                self._vllm_config, specs, self._free_bytes(), config.resident_state_gib
            )
        return [
            layers | self._placed(self._size, _state_specs(layers)) for layers in specs
        ]

    def _placed(self, size: int, specs: dict[str, MambaSpec]) -> LayerSpecs:
        return {
            name: ResidentStateSpec.of(
                spec, size, states_per_request(spec, self._vllm_config)
            )
            for name, spec in specs.items()
        }

    def _free_bytes(self) -> int:
        """Memory that each rank may take."""
        if not current_platform.is_cpu():
            return min(self._device_bytes())
        num_ranks = self._vllm_config.parallel_config.local_world_size
        return unpromised_host_bytes() // (
            num_ranks * data_parallel_size(self._vllm_config)
        )


def shared_groups(config: KVCacheConfig) -> list[KVCacheGroupSpec]:
    """Groups that take blocks of the memory nodes' pool."""
    return [
        group
        for group in config.kv_cache_groups
        if not isinstance(group.kv_cache_spec, ResidentStateSpec)
    ]


def choose_pool_size(
    vllm_config: VllmConfig,
    specs: list[LayerSpecs],
    free_bytes: int,
    state_gib: float | None,
) -> int:
    """Choose how many states each layer has, vLLM's empty one among them.

    Args:
        vllm_config: The engine's configuration.
        specs: Of each rank's layers, by name; some have states.
        free_bytes: Memory of the compute node for one rank's states.
        state_gib: What the user gave for them; None: what max_num_seqs requests hold,
            with prefix caching some times that, as far as half of the free memory goes.

    Raises:
        ValueError: The given size is not there, or holds no request.
    """
    ranks = list(map(_state_specs, specs))
    bytes_each = max(sum(map(state_bytes, rank.values())) for rank in ranks)
    held = max(
        states_per_request(spec, vllm_config)
        for rank in ranks
        for spec in rank.values()
    )
    budget = int(free_bytes * _FREE_SHARE if state_gib is None else state_gib * GIB)
    fits = budget // bytes_each
    if fits <= held or budget > free_bytes:
        smallest = (held + 1) * bytes_each
        raise ValueError(_refusal(state_gib, budget, smallest, free_bytes))
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    chosen = fits
    if state_gib is None:
        is_caching = vllm_config.cache_config.enable_prefix_caching
        wanted = max_num_seqs * held * (_CACHED_SHARE if is_caching else 1) + 1
        chosen = min(fits, wanted)
    _tell(chosen, bytes_each, (chosen - 1) // held, max_num_seqs)
    return chosen


def _state_specs(layers: LayerSpecs) -> dict[str, MambaSpec]:
    return {name: spec for name, spec in layers.items() if isinstance(spec, MambaSpec)}


def _check_kernels(specs: list[LayerSpecs]) -> None:
    """Refuse prefix caching of Mamba-2 layers on a CPU.

    It wants states within a prompt; ``mamba_chunk_scan_fwd_cpu`` returns that of its
    end, and a longer prompt would end the engine.
    """
    if current_platform.is_cpu() and any(
        spec.mamba_cache_mode == "align" and spec.num_prefill_checkpoint_blocks
        for layers in specs
        for spec in _state_specs(layers).values()
    ):
        raise ValueError(
            "Attention offloading does not support prefix caching of Mamba-2 layers on "
            "CPUs, where vLLM keeps no states within a prompt. Allowed: prefix caching "
            "off. Pass --no-enable-prefix-caching."
        )


def _tell(chosen: int, bytes_each: int, num_requests: int, max_num_seqs: int) -> None:
    logger.info(
        "Recurrent states stay on the compute node: %s for %d of each layer, those of "
        "%d running requests.",
        byte_size(chosen * bytes_each),
        chosen,
        num_requests,
    )
    if num_requests < max_num_seqs:
        logger.warning(
            "There are recurrent states for %d running requests, fewer than "
            "max_num_seqs=%d: others wait. Raise resident_state_gib as far as the "
            "compute node has memory, or lower max_num_seqs.",
            num_requests,
            max_num_seqs,
        )


def _refusal(
    state_gib: float | None, budget: int, smallest: int, free_bytes: int
) -> str:
    given = (
        f"Half of the compute node's free memory, {byte_size(budget)}, is for"
        if state_gib is None
        else f"resident_state_gib={state_gib:g} was given for"
    )
    given = f"{given} recurrent states, and {byte_size(free_bytes)} are free."
    if smallest > free_bytes:
        return (
            f"{given} Allowed: {byte_size(smallest)} and more, which one request "
            "takes. Free memory on the compute node, or run without "
            "--attention-offload."
        )
    return (
        f"{given} Allowed: from {round_up_gib(smallest)} GiB, which one request takes, "
        f"to {free_bytes / GIB:.4g} GiB. Set resident_state_gib to a size between them."
    )
