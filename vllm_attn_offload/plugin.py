# SPDX-License-Identifier: Apache-2.0
"""Entry point of the plugin; vLLM calls it in every process it starts."""

from __future__ import annotations

BACKEND_PATH = "vllm_attn_offload.attention.backend.AttentionOffloadBackend"


def register() -> None:
    """Add the command-line flags and the attention backend.

    Never raises, because an installed but unused plugin must not stop vLLM. If it
    cannot work it warns once, and using attention offloading raises.
    """
    from vllm_attn_offload.logger import get_logger
    from vllm_attn_offload.versions import is_tested, untested_message, vllm_version

    logger = get_logger(__name__)
    version = vllm_version()
    if not is_tested(version):
        logger.warning_once("%s vLLM itself is not touched.", untested_message(version))
        return
    try:
        _register()
    except Exception as error:
        logger.warning_once("Attention offloading is not available: %s", error)


def _register() -> None:
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    from vllm_attn_offload.patches import apply_patches

    # CUSTOM and not a name of our own: a config that holds a new enum member cannot
    # be unpickled in a process that has not loaded this plugin yet.
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    apply_patches()
