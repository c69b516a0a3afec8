# SPDX-License-Identifier: Apache-2.0
"""NUMA domains of a node's CPUs, as the kernel lists them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vllm_attn_offload.memory_node.numa_domains import domains_of, log_numa_domains


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Two domains with hyper-threads, and one of memory alone."""
    for domain, cpus in enumerate(("0-7,16-23", "8-15,24-31", "")):
        (tmp_path / f"node{domain}").mkdir()
        (tmp_path / f"node{domain}" / "cpulist").write_text(f"{cpus}\n")
    (tmp_path / "online").write_text("0-2\n")
    return tmp_path


def test_cpus_are_divided(two_sockets: Path) -> None:
    assert domains_of({1, 17, 9}, two_sockets) == {0: [1, 17], 1: [9]}
    assert domains_of({8}, two_sockets) == {0: [], 1: [8]}


def test_one_domain_of_two(two_sockets: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_numa_domains({8, 9, 24}, two_sockets)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "of NUMA domain 1, of 2" in record.message


def test_both_domains(two_sockets: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the options that make a node of each."""
    log_numa_domains(range(32), two_sockets)
    assert "CPUs are of NUMA domains 0, 1:" in caplog.text
    assert "start them with --cpus 0-7,16-23 and --cpus 8-15,24-31." in caplog.text


@pytest.mark.parametrize("domains", [0, 1])
def test_nothing_to_say(
    domains: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for domain in range(domains):
        (tmp_path / f"node{domain}").mkdir()
        (tmp_path / f"node{domain}" / "cpulist").write_text("0-3\n")
    with caplog.at_level(logging.INFO):
        log_numa_domains({0, 1}, tmp_path)
    assert not caplog.records
