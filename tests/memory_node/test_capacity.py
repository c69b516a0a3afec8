# SPDX-License-Identifier: Apache-2.0
"""The ledger of a node's KV budget."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from vllm_attn_offload.memory_node.capacity import (
    CapacityError,
    CapacityLedger,
    available_host_bytes,
)
from vllm_attn_offload.protocol.messages import GIB


def test_reserve_and_release() -> None:
    ledger = CapacityLedger(10)
    ledger.reserve("a", 4)
    ledger.reserve("b", 6)
    assert ledger.free_bytes == 0
    ledger.release("a")
    ledger.release("a")
    ledger.release("unknown")
    assert ledger.free_bytes == 4


def test_reserve_names_both_numbers() -> None:
    ledger = CapacityLedger(4 * GIB)
    ledger.reserve("a", 3 * GIB)
    with pytest.raises(CapacityError) as error:
        ledger.reserve("b", 2 * GIB)
    assert "2.00 GiB of KV cache were asked for" in str(error.value)
    assert "only 1.00 GiB of 4.00 GiB are free" in str(error.value)
    assert "Lower kv_cache_gib" in str(error.value)
    assert ledger.free_bytes == GIB


def test_reserve_from_several_threads() -> None:
    ledger = CapacityLedger(50)

    def reserve(number: int) -> bool:
        try:
            ledger.reserve(str(number), 1)
        except CapacityError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(reserve, range(200))) == 50
    assert ledger.free_bytes == 0


@pytest.mark.parametrize(
    ("directory", "limit", "usage", "cache"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        (
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
    ids=["v2", "v1"],
)
def test_available_host_bytes_of_a_container(
    tmp_path: Path, directory: str, limit: str, usage: str, cache: str
) -> None:
    """A container's limit counts, less what it uses; its page cache is not used."""
    group = tmp_path / directory
    group.mkdir(exist_ok=True)
    (group / limit).write_text(f"{100 << 20}\n")
    (group / usage).write_text(f"{70 << 20}\n")
    (group / "memory.stat").write_text(f"anon 1\n{cache} {20 << 20}\n")
    assert available_host_bytes(tmp_path) == 50 << 20
    (group / usage).write_text(f"{200 << 20}\n")
    assert available_host_bytes(tmp_path) == 0


def test_available_host_bytes_of_a_group_in_a_group(tmp_path: Path) -> None:
    """As systemd makes them: the tightest group counts, wherever it is."""
    groups = tmp_path / "groups"
    groups.write_text("0::/system.slice/node.service\n")
    service = tmp_path / "system.slice" / "node.service"
    service.mkdir(parents=True)
    for group, limit in ((service, 60 << 20), (service.parent, 90 << 20)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{50 << 20}\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 0\n")
    assert available_host_bytes(tmp_path, groups) == 10 << 20


def test_available_host_bytes_without_a_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    total = psutil.virtual_memory().total
    assert 0 < available_host_bytes(tmp_path) <= total
    assert 0 < available_host_bytes(tmp_path / "nothing") <= total
