# SPDX-License-Identifier: Apache-2.0
"""vLLM versions that this release was tested with."""

from __future__ import annotations

TESTED_VLLM = "0.32"


def vllm_version() -> str:
    """Return the version of the installed vLLM.

    It is ``vllm.__version__`` and not the distribution's, because the CPU build is
    distributed under another name.
    """
    import vllm

    return vllm.__version__


def is_tested(version: str) -> bool:
    """Return True for a vLLM release of ``TESTED_VLLM``."""
    return version.split("+")[0].split(".")[:2] == TESTED_VLLM.split(".")


def untested_message(version: str) -> str:
    """Return the message for users of an untested vLLM."""
    return (
        f"vllm-attn-offload supports vLLM {TESTED_VLLM}.x; found {version}. Install "
        f"vLLM {TESTED_VLLM}, or run without attention offloading."
    )
