# SPDX-License-Identifier: Apache-2.0
"""vLLM's front end in Rust, which runs no middleware."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.logger import get_logger

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = get_logger(__name__)


def warn_of_rust_frontend(
    engine_args: EngineArgs, config: AttentionOffloadConfig
) -> None:
    """Say where the metrics are that ``/metrics`` of such a front end does not show."""
    # Only the process that starts front ends has this rank.
    if not envs.VLLM_USE_RUST_FRONTEND or engine_args._api_process_rank >= 0:
        return
    addresses = (*config.addresses, *config.standby_nodes)
    where = (
        f"Scrape the memory nodes themselves ({', '.join(addresses)}), started with "
        "--metrics-listen HOST:PORT"
        if addresses
        else "Run memory nodes of your own, vllm-memory-node --metrics-listen "
        "HOST:PORT, scrape them, and name them in memory_nodes"
    )
    logger.warning_once(
        "VLLM_USE_RUST_FRONTEND=1: vLLM's Rust front end answers /metrics and /health "
        "itself, and shows neither memory nodes nor that they are away. %s; or use the "
        "Python front end, without that variable.",
        where,
    )
