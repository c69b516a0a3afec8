# SPDX-License-Identifier: Apache-2.0
"""The ledger of a node's KV budget."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_attn_offload.memory_node.capacity import GIB, CapacityError, CapacityLedger


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
    assert "only 1.00 of 4.00 GiB are free" in str(error.value)
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
