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
    if problem := small_pages_problem(settings, status):
        logger.warning(
            "KV blocks lie in small pages of %s, which takes longer to read: %s.",
            byte_size(mmap.PAGESIZE),
            problem,
        )
        return
    num_bytes, file, setting = _setting(settings)
    logger.info(
        "KV blocks lie in huge pages of %s while the host has such free (%s is %s)",
        byte_size(num_bytes),
        file,
        setting,
    )


def small_pages_problem(settings: Path = _SETTINGS, status: Path = _STATUS) -> str:
    """Say why KV blocks would lie in small pages, and what to do; "": they do not.

    Args:
        settings: Of transparent huge pages.
        status: Status of this process.
    """
    _, file, setting = _setting(settings)
    if re.search(r"^THP_enabled:\s*0$", _read(status), re.MULTILINE):
        return (
            "this process was started without them (PR_SET_THP_DISABLE). Allowed: "
            "with. Ask who starts it, such as the container's runtime"
        )
    if setting in ("always", "madvise"):
        return ""
    if setting:
        return (
            f"{file} is {setting}. Allowed: madvise, or always. Write one of them there"
        )
    return (
        f"this kernel has no {file}. Allowed: one with transparent huge pages. "
        "Nodes work without, too"
    )


def _setting(settings: Path) -> tuple[int, Path, str]:
    """Bytes of a huge page, and the file that says who gets some, with its word."""
    num_bytes = int(_read(settings / "hpage_pmd_size") or 0)
    file, setting = settings / "enabled", _chosen(settings / "enabled")
    # Newer kernels have a file for each size, which goes first.
    own = settings / f"hugepages-{num_bytes >> 10}kB" / "enabled"
    if (chosen := _chosen(own)) not in ("", "inherit"):
        file, setting = own, chosen
    return num_bytes, file, setting


def _chosen(file: Path) -> str:
    """The word in brackets; empty where there is none."""
    match = re.search(r"\[(\w+)\]", _read(file))
    return match[1] if match else ""


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
