# SPDX-License-Identifier: Apache-2.0
"""How this host's CPUs are divided between workers and local memory nodes."""

from __future__ import annotations

import math
import os
import re

import pytest
from vllm.config import VllmConfig
from vllm.utils.cpu_resource_utils import LogicalCPUInfo
from vllm.utils.ompmultiprocessing import OMPProcessManager

from vllm_attn_offload.config import COMMON_CPUS_VARIABLE, AttentionOffloadConfig
from vllm_attn_offload.cpu_list import parse_cpu_list
from vllm_attn_offload.engine.args import environment_of_one_engine
from vllm_attn_offload.engine.cpu_shares import by_domain, check_cpus, local_cpus

USABLE = sorted(os.sched_getaffinity(0))


def divide(quota: float, **options: object) -> tuple[set[int], set[int]]:
    """CPUs of workers and of nodes, as vLLM and the launcher get them."""
    config = AttentionOffloadConfig.from_dict(options)
    with environment_of_one_engine():
        texts = local_cpus(config, VllmConfig(), quota)
        workers = OMPProcessManager(VllmConfig()).cpu_lists
    nodes = {cpu for text in texts if text for cpu in parse_cpu_list(text)}
    return {cpu for cpus in workers for cpu in cpus}, nodes


@pytest.fixture(autouse=True)
def _automatic_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's host; some workers of pytest-xdist are bound."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)


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


@pytest.mark.parametrize("num_microbatches", [1, 2, "auto"])
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("quota", [0.5, 1, 1.5, *range(2, len(USABLE) + 2)])
def test_workers_and_nodes_keep_to_a_quota(
    quota: float, num_nodes: int, num_microbatches: object
) -> None:
    """A container that may use fewer CPUs than it sees is throttled otherwise."""
    workers, nodes = divide(
        quota, num_local_nodes=num_nodes, num_microbatches=num_microbatches
    )
    assert workers
    assert nodes
    assert len(workers | nodes) <= max(1, int(quota))
    if num_microbatches != 2:
        assert workers <= nodes
    elif quota >= 2:
        assert not workers & nodes


def test_whole_steps_take_turns() -> None:
    """The worker waits while it is attended: each has all cores meanwhile."""
    with environment_of_one_engine():
        (cpus,) = local_cpus(AttentionOffloadConfig(), VllmConfig(), math.inf)
        (workers,) = OMPProcessManager(VllmConfig()).cpu_lists
        nodes = parse_cpu_list(cpus)
        # With more cores vLLM keeps one for its scheduler.
        assert sorted(workers) == sorted(nodes) or len(nodes) > len(workers) >= 4
        assert os.environ["GOMP_SPINCOUNT"].isdecimal()
        assert COMMON_CPUS_VARIABLE in os.environ
    assert COMMON_CPUS_VARIABLE not in os.environ
    assert "GOMP_SPINCOUNT" not in os.environ
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


def test_cpus_of_a_numa_domain_stay_together() -> None:
    """Also where the kernel numbers them in turns; halves are of one domain then."""
    infos = [LogicalCPUInfo(cpu, cpu, cpu % 2) for cpu in range(8)]
    assert by_domain([4, 5, 6, 7], infos) == [4, 6, 5, 7]
    assert by_domain([7, 3], []) == [3, 7]


@pytest.mark.parametrize(
    ("name", "expected"), [("OMP_WAIT_POLICY", None), ("GOMP_SPINCOUNT", "7")]
)
def test_how_threads_wait_is_the_users(
    name: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "7")
    with environment_of_one_engine():
        local_cpus(AttentionOffloadConfig(), VllmConfig(), math.inf)
        assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATTN_OFFLOAD_DATA_PARALLEL_SIZE", "2"),
        ("LD_PRELOAD", "/opt/intel/lib/libiomp5.so"),
    ],
)
def test_who_works_at_the_same_time_divides_cores(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of a deployment, and threads that spin for long."""
    monkeypatch.setenv(name, value)
    workers, nodes = divide(math.inf)
    assert workers
    assert len(USABLE) == 1 or not workers & nodes


def test_given_cpus_count_under_a_quota() -> None:
    """The workers get what is left of it, one CPU at least."""
    workers, nodes = divide(1, local_node_cpus=USABLE[0])
    assert nodes == {USABLE[0]}
    assert len(workers) == 1


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_unbound_nodes_keep_to_a_quota(
    num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    workers, nodes = divide(1, num_local_nodes=num_nodes)
    assert not workers
    assert len(nodes) == 1


def test_nodes_beside_bound_workers_keep_to_a_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The user's CPUs are the workers'; a node has one CPU at least."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(USABLE[0]))
    workers, nodes = divide(1)
    assert workers == {USABLE[0]}
    assert len(nodes) == 1


def test_cpus_that_are_not_here() -> None:
    """Refused before a node is started, unless nodes run elsewhere."""
    usable = sorted(os.sched_getaffinity(0))
    check_cpus(AttentionOffloadConfig(local_node_cpus=str(usable[0])))
    check_cpus(AttentionOffloadConfig(("a:1",), local_node_cpus="4095"))
    allowed = f"CPU 4095 is not usable here. Allowed: {','.join(map(str, usable))}. "
    with pytest.raises(ValueError, match=re.escape(allowed)):
        check_cpus(AttentionOffloadConfig(local_node_cpus="0,4095"))


@pytest.mark.parametrize("text", ["a-b", "1-", "0;1", "0-9999999999", "0|0-9999999999"])
def test_cpus_that_are_no_list(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = re.escape(f"VLLM_CPU_OMP_THREADS_BIND={text!r}")
    allowed = r" was given\. Allowed: CPU numbers and .+ Write for example 8-15"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", text)
    with pytest.raises(ValueError, match=given + allowed):
        local_cpus(AttentionOffloadConfig(), VllmConfig())
    # Workers have CPUs also where the nodes are elsewhere.
    with pytest.raises(ValueError, match=given + allowed):
        check_cpus(AttentionOffloadConfig(("a:1",)))
