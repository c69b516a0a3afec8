# SPDX-License-Identifier: Apache-2.0
"""What a node says of the pages that its KV blocks lie in."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from pathlib import Path

import pytest
from node_process import NodeProcess, running_node
from raw_session import RawSession, make_geometry

from vllm_attn_offload.memory_node.huge_pages import log_huge_pages

MIB, NUM_BLOCKS = 1 << 20, 200
KERNEL = Path("/sys/kernel/mm/transparent_hugepage")


def settings(directory: Path, whole: str, own: str = "") -> Path:
    """A kernel's settings: of all sizes, and on newer kernels of 2 MiB."""
    (directory / "hpage_pmd_size").write_text(f"{2 * MIB}\n")
    (directory / "enabled").write_text(whole)
    if own:
        (directory / "hugepages-2048kB").mkdir()
        (directory / "hugepages-2048kB" / "enabled").write_text(own)
    return directory


@pytest.mark.parametrize(
    ("whole", "own", "are_used"),
    [
        ("[always] madvise never", "", True),
        ("always [madvise] never", "", True),
        ("always madvise [never]", "", False),
        ("always [madvise] never", "always [inherit] madvise never", True),
        ("always madvise [never]", "always [inherit] madvise never", False),
        ("always [madvise] never", "always inherit madvise [never]", False),
        ("always madvise [never]", "always inherit [madvise] never", True),
    ],
)
def test_the_kernels_settings(
    whole: str,
    own: str,
    are_used: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        log_huge_pages(settings(tmp_path, whole, own), tmp_path / "status")
    (record,) = caplog.records
    if are_used:
        assert record.levelname == "INFO"
        assert "KV blocks lie in huge pages of 2.00 MiB" in record.message
    else:
        assert record.levelname == "WARNING"
        assert "small pages of 4.00 KiB" in record.message
        assert "enabled is never. Allowed: madvise, or always" in record.message


def test_a_process_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nTHP_enabled:\t0\n")
    log_huge_pages(settings(tmp_path, "[always] madvise never"), status)
    assert "this process was started without them" in caplog.text


def test_a_kernel_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_huge_pages(tmp_path, tmp_path / "status")
    assert f"this kernel has no {tmp_path}/enabled" in caplog.text


@pytest.mark.parametrize("options", [(), ("--preallocate",)], ids=["later", "at start"])
@pytest.mark.parametrize("kernel", ["cpp", "torch"])
def test_all_blocks_ask_for_them(
    tmp_path: Path, kernel: str, options: tuple[str, ...]
) -> None:
    geometry = make_geometry()
    block_bytes = len(geometry.layers) * 2 * 16 * 3 * 64 * 4
    options = ("--attention-kernel", kernel, "--kv-cache-gib", "0.05", *options)
    with running_node(tmp_path, *options) as node:
        assert node.log().count("KV blocks lie in") == 1
        with closing(RawSession(node.address, geometry, NUM_BLOCKS)):
            if KERNEL.exists():
                assert advised_bytes(node) >= NUM_BLOCKS * block_bytes


def advised_bytes(node: NodeProcess) -> int:
    """Mapped memory of a node for which huge pages were asked."""
    text = Path(f"/proc/{node.process.pid}/smaps").read_text()
    sizes = re.findall(r"^Size:\s+(\d+) kB$", text, re.MULTILINE)
    flags = re.findall(r"^VmFlags:(.*)$", text, re.MULTILINE)
    return sum(
        int(size) << 10
        for size, names in zip(sizes, flags, strict=True)
        if "hg" in names.split()
    )
