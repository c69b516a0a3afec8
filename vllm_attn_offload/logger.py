# SPDX-License-Identifier: Apache-2.0
"""Loggers that reach vLLM's handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.logger import _VllmLogger


def get_logger(name: str) -> _VllmLogger:
    """Return the logger of a module on the compute node.

    vLLM attaches its handler only to the logger ``vllm``, so ours are its children; a
    bare ``vllm_attn_offload.*`` logger prints nothing.
    """
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")
