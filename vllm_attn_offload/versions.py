# SPDX-License-Identifier: Apache-2.0
"""The vLLM versions that this release was tested with."""

from __future__ import annotations

TESTED_VLLM = "0.32"


def vllm_version() -> str:
    """Version of the installed vLLM.

    ``vllm.__version__`` and not the distribution's: the CPU build is distributed under
    another name.
    """
    import vllm

    return vllm.__version__


def is_tested(version: str) -> bool:
    """Whether a vLLM version is one of ``TESTED_VLLM``."""
    return version.split("+")[0].split(".")[:2] == TESTED_VLLM.split(".")


def untested_message(version: str) -> str:
    """What a user of an untested vLLM reads."""
    return (
        f"vllm-attn-offload supports vLLM {TESTED_VLLM}.x; found {version}. Install "
        f"vLLM {TESTED_VLLM}, or run without attention offloading."
    )
