# SPDX-License-Identifier: Apache-2.0
"""Sizes the pool of recurrent states that a hybrid model keeps on the compute node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import MambaSpec

from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.messages import GIB
from vllm_attn_offload.worker.resident_state import (
    ResidentStateSpec,
    states_per_request,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

    LayerSpecs = dict[str, KVCacheSpec]

logger = get_logger(__name__)

#: Of the free memory, where no size is given: steps need memory, too.
_FREE_SHARE = 0.5


def has_states(specs: LayerSpecs) -> bool:
    """Tell whether a rank has layers with recurrent states."""
    return any(isinstance(spec, MambaSpec) for spec in specs.values())


def shared_groups(config: KVCacheConfig) -> list[KVCacheGroupSpec]:
    """Groups that take blocks of the memory nodes' pool."""
    return [
        group
        for group in config.kv_cache_groups
        if not isinstance(group.kv_cache_spec, ResidentStateSpec)
    ]


def with_resident_states(specs: list[LayerSpecs], pool_size: int) -> list[LayerSpecs]:
    """Give layers with recurrent states a pool of their own.

    Args:
        specs: Of each rank's layers, by name.
        pool_size: States of each of these layers.
    """
    return [
        {
            name: ResidentStateSpec.of(spec, pool_size)
            if isinstance(spec, MambaSpec)
            else spec
            for name, spec in layers.items()
        }
        for layers in specs
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
        state_gib: What the user gave for them; None: what max_num_seqs needs, as far
            as half of the free memory goes.

    Raises:
        ValueError: The given size is not there, or holds no request.
    """
    bytes_each = max(map(_bytes_of_all_layers, specs))
    held = max(
        states_per_request(spec, vllm_config)
        for layers in specs
        for spec in layers.values()
        if isinstance(spec, MambaSpec)
    )
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    budget = int(free_bytes * _FREE_SHARE)
    if state_gib is not None:
        budget = int(state_gib * GIB)
    fits = budget // bytes_each
    smallest = (held + 1) * bytes_each
    if fits <= held or budget > free_bytes:
        raise ValueError(_refusal(state_gib, budget, smallest, free_bytes))
    wanted = max_num_seqs * held + 1
    if state_gib is None and fits < wanted:
        logger.warning(
            "Recurrent states of %d sequences fit in half of the compute node's free "
            "memory (%s), fewer than max_num_seqs=%d: others wait. Set "
            "resident_state_gib to use more, or lower max_num_seqs.",
            (fits - 1) // held,
            byte_size(free_bytes),
            max_num_seqs,
        )
    chosen = fits if state_gib else min(wanted, fits)
    logger.info(
        "Recurrent states stay on the compute node: %s for %d of each layer (%s a "
        "request).",
        byte_size(chosen * bytes_each),
        chosen,
        byte_size(held * bytes_each),
    )
    return chosen


def _bytes_of_all_layers(layers: LayerSpecs) -> int:
    """Bytes of one state of each layer of a rank."""
    return sum(
        ResidentStateSpec.of(spec, 0).state_bytes
        for spec in layers.values()
        if isinstance(spec, MambaSpec)
    )


def _refusal(
    state_gib: float | None, budget: int, smallest: int, free_bytes: int
) -> str:
    given = (
        f"half of the compute node's free memory, {byte_size(budget)}, is for"
        if state_gib is None
        else f"resident_state_gib={state_gib:g} was given for"
    )
    return (
        f"{given} recurrent states; one request's take {smallest / GIB:.3g} GiB, and "
        f"{free_bytes / GIB:.3g} GiB are free. Allowed: a size between the two. Set "
        "resident_state_gib, free memory on the compute node, or run this model "
        "without --attention-offload."
    )
