# SPDX-License-Identifier: Apache-2.0
"""How this host's CPUs, memory and GPUs are divided between local memory nodes."""

from __future__ import annotations

import os
import re

import psutil
import pytest
from vllm.config import VllmConfig

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.placement import (
    check_local_cpus,
    choose_devices,
    local_cpus,
    local_kv_cache_gib,
)
from vllm_attn_offload.memory_node.memory_claim import unpromised_host_bytes
from vllm_attn_offload.protocol.messages import GIB


@pytest.mark.parametrize(
    ("num_nodes", "given", "expected"),
    [
        (1, "8-15", ["8-15"]),
        (2, "0-4", ["0,1", "2,3,4"]),
        (3, "6,7", ["6,7", "6,7", "6,7"]),
    ],
)
def test_given_cpus(num_nodes: int, given: str, expected: list[str]) -> None:
    config = AttentionOffloadConfig(num_local_nodes=num_nodes, local_node_cpus=given)
    assert local_cpus(config, VllmConfig()) == expected


def test_nodes_avoid_the_cores_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the ranks that another engine of the deployment starts."""
    first, *rest = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{first}")
    (cpus,) = local_cpus(AttentionOffloadConfig(), VllmConfig())
    assert cpus == ",".join(map(str, rest))


def test_nodes_are_not_bound_where_workers_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each node may use all CPUs, unless the user chose some for the nodes."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    config = AttentionOffloadConfig(num_local_nodes=2)
    assert local_cpus(config, VllmConfig()) == ["", ""]
    config = AttentionOffloadConfig(num_local_nodes=2, local_node_cpus="0-3")
    assert local_cpus(config, VllmConfig()) == ["0,1", "2,3"]


def test_local_memory() -> None:
    """A node alone uses its own default; several share what one would take."""
    assert local_kv_cache_gib(AttentionOffloadConfig(), 1) is None
    assert local_kv_cache_gib(AttentionOffloadConfig(kv_cache_gib=2), 3) == 2
    # Nodes of other tests come and go, and so do their promises.
    before = unpromised_host_bytes() / GIB
    share = local_kv_cache_gib(AttentionOffloadConfig(num_local_nodes=2), 2)
    after = unpromised_host_bytes() / GIB
    assert share is not None
    assert 0.5 * min(before, after) < share * 8 < 2 * max(before, after)
    assert share * 8 < psutil.virtual_memory().total / GIB


def test_cpus_that_are_not_here() -> None:
    """Refused before a node is started, unless nodes run elsewhere."""
    usable = sorted(os.sched_getaffinity(0))
    check_local_cpus(AttentionOffloadConfig(local_node_cpus=str(usable[0])))
    check_local_cpus(AttentionOffloadConfig(("a:1",), local_node_cpus="4095"))
    allowed = f"CPU 4095 is not usable here. Allowed: {','.join(map(str, usable))}. "
    with pytest.raises(ValueError, match=re.escape(allowed)):
        check_local_cpus(AttentionOffloadConfig(local_node_cpus="0,4095"))


@pytest.mark.parametrize("text", ["a-b", "1-", "0;1"])
def test_cpus_that_are_no_list(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = r" was given\. Allowed: CPU numbers and .+ Write for example 8-15"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", text)
    with pytest.raises(
        ValueError, match=f"VLLM_CPU_OMP_THREADS_BIND={text!r}{allowed}"
    ):
        local_cpus(AttentionOffloadConfig(), VllmConfig())


@pytest.mark.parametrize(
    ("num_nodes", "engine", "spare", "expected"),
    [
        (1, 0, [], ["cpu"]),
        (1, 0, [1], ["cuda:1"]),
        (1, 1, [2, 3], ["cuda:3"]),
        (2, 0, [2, 3], ["cuda:2", "cuda:3"]),
        (2, 0, [2], ["cpu", "cpu"]),
        (1, 0, [7], ["cpu"]),
    ],
    ids=["none", "one", "second-engine", "two", "too-few", "busy"],
)
def test_choose_devices(
    num_nodes: int, engine: int, spare: list[int], expected: list[str]
) -> None:
    """Idle GPUs only, and all nodes of an engine on the same kind of device."""
    assert choose_devices(num_nodes, engine, spare, lambda gpu: gpu != 7) == expected
