# SPDX-License-Identifier: Apache-2.0
"""Rules of the options with which Ray places or finds memory nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_attn_offload.config import AttentionOffloadConfig

#: Not a number, which would be the port of a host called ray.
POOL_NAME = re.compile(r"[A-Za-z][\w.-]{0,63}", re.ASCII)
_POOL = re.compile(rf"ray(?::({POOL_NAME.pattern}))?", re.ASCII)


def ray_pool(memory_nodes: Sequence[str]) -> str | None:
    """Return the pool that ``ray:NAME`` names, empty for ``ray``; None: addresses."""
    pools = [match[1] or "" for match in map(_POOL.fullmatch, memory_nodes) if match]
    return pools[0] if pools else None


def check_ray_options(config: AttentionOffloadConfig) -> None:
    """Refuse what nodes of Ray do not take, and their options for other nodes.

    Raises:
        ValueError: The message says what is allowed.
    """
    pool = config.ray_pool
    if pool is not None:
        _check_nodes(config, pool)
    if pool != "":
        _refuse(
            config,
            {"ray_nodes": 1, "ray_device": "cpu", "ray_resources": None},
            f"memory_nodes {_written(config)}",
            "with memory_nodes ray, whose nodes the engine places. Drop them; 'vllm-"
            "attn-offload ray up' has such options for shared pools",
        )


def _check_nodes(config: AttentionOffloadConfig, pool: str) -> None:
    if len(config.memory_nodes) > 1:
        raise ValueError(
            f"memory_nodes was given {_written(config)}. Allowed: ray or ray:NAME "
            "alone, or addresses. Name running nodes as standby_nodes, or drop one of "
            "the two kinds."
        )
    _refuse(
        config,
        {"num_local_nodes": 1, "local_node_cpus": ""},
        f"memory_nodes {_written(config)}",
        "without memory_nodes, for nodes of this host. Drop them; ray_nodes is the "
        "number of nodes that Ray places",
    )
    _refuse(
        config,
        {"tls_cert": "", "tls_key": "", "tls_ca": ""},
        f"memory_nodes {_written(config)}",
        "with addresses of nodes, whose certificates name them. Drop them, or start "
        "'vllm-memory-node' with --tls-cert and name its address",
    )
    if not pool and config.kv_cache_gib is None:
        raise ValueError(
            "kv_cache_gib was not given together with memory_nodes ray. Allowed: the "
            "size of each node that Ray places, because their hosts are not known "
            "before. Write for example kv_cache_gib: 4."
        )


def _refuse(
    config: AttentionOffloadConfig, defaults: dict[str, object], given: str, where: str
) -> None:
    named = [
        name for name, default in defaults.items() if getattr(config, name) != default
    ]
    if named:
        raise ValueError(
            f"{', '.join(named)} was given together with {given}. Allowed: {where}."
        )


def _written(config: AttentionOffloadConfig) -> str:
    return ", ".join(config.memory_nodes) or "unset"
