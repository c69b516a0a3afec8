# SPDX-License-Identifier: Apache-2.0
"""vLLM versions that this release was checked with; the README says how."""

from __future__ import annotations

TESTED_VLLM = ("0.32", "0.33")


def vllm_version() -> str:
    """Return the version of the installed vLLM.

    It is ``vllm.__version__`` and not the distribution's, because the CPU build is
    distributed under another name.
    """
    import vllm

    return vllm.__version__


def is_tested(version: str) -> bool:
    """Return True for a vLLM release of ``TESTED_VLLM``."""
    return ".".join(version.split("+")[0].split(".")[:2]) in TESTED_VLLM


def untested_message(version: str) -> str:
    """Return the message for users of an untested vLLM."""
    supported = " and ".join(f"{each}.x" for each in TESTED_VLLM)
    return (
        f"vllm-attn-offload supports vLLM {supported}; found {version}. Install vLLM "
        f"{' or '.join(TESTED_VLLM)}, or run without attention offloading."
    )
