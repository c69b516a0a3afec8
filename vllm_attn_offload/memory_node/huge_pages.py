# SPDX-License-Identifier: Apache-2.0
"""Says at start if KV blocks lie in huge pages; all pools ask for them."""

from __future__ import annotations

import logging
import mmap
import re
from pathlib import Path

from vllm_attn_offload.protocol.byte_size import byte_size

logger = logging.getLogger(__name__)

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_STATUS = Path("/proc/self/status")


def log_huge_pages(settings: Path = _SETTINGS, status: Path = _STATUS) -> None:
    """Say what the kernel answers to ``MADV_HUGEPAGE``; where it is no, what to do.

    Args:
        settings: Of transparent huge pages.
        status: Status of this process.
    """
    num_bytes = int(_read(settings / "hpage_pmd_size") or 0)
    file, setting = settings / "enabled", _chosen(settings / "enabled")
    # Newer kernels have a file for each size, which goes first.
    own = settings / f"hugepages-{num_bytes >> 10}kB" / "enabled"
    if (chosen := _chosen(own)) not in ("", "inherit"):
        file, setting = own, chosen
    if re.search(r"^THP_enabled:\s*0$", _read(status), re.MULTILINE):
        problem = (
            "this process was started without them (PR_SET_THP_DISABLE). Allowed: "
            "with. Ask who starts it, such as the container's runtime"
        )
    elif setting in ("always", "madvise"):
        logger.info(
            "KV blocks lie in huge pages of %s while the host has such free (%s is %s)",
            byte_size(num_bytes),
            file,
            setting,
        )
        return
    elif setting:
        problem = (
            f"{file} is {setting}. Allowed: madvise, or always. Write one of them there"
        )
    else:
        problem = (
            f"this kernel has no {file}. Allowed: one with transparent huge pages. "
            "Nodes work without, too"
        )
    logger.warning(
        "KV blocks lie in small pages of %s, which takes longer to read: %s.",
        byte_size(mmap.PAGESIZE),
        problem,
    )


def _chosen(file: Path) -> str:
    """The word in brackets; empty where there is none."""
    match = re.search(r"\[(\w+)\]", _read(file))
    return match[1] if match else ""


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
