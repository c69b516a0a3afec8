# SPDX-License-Identifier: Apache-2.0
"""Findings about a host, each made true for a process before it is asked."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doctor_findings import CONFIGS, Look, one
from package_copies import copy_package, link_site_packages

from vllm_attn_offload.doctor.host_cpus import check_numa

_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
#: prctl(PR_SET_THP_DISABLE, 1), which survives exec.
_NO_HUGE_PAGES = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def cgroup() -> Iterator[Callable[..., list[str]]]:
    """``cgroup("memory", {"memory.limit_in_bytes": 1 << 29})``: a prefix to enter it.

    Files of version 1; skips where none can be made.
    """
    made: list[Path] = []

    def make(controller: str, limits: dict[str, int]) -> list[str]:
        group = Path("/sys/fs/cgroup", controller, f"doctor-{os.getpid()}")
        try:
            group.mkdir()
            made.append(group)
            for name, value in limits.items():
                (group / name).write_text(str(value))
        except OSError as error:
            pytest.skip(f"no control group of version 1 can be made here: {error}")
        return ["sh", "-c", _ENTER, str(group)]

    yield make
    for group in made:
        with contextlib.suppress(OSError):
            group.rmdir()


@pytest.mark.parametrize(
    ("limit", "severity", "found"),
    [
        (200, "fail", "only 200 files may be open"),
        (1000, "warn", "serves 250 connections, not 512"),
        (2048, "ok", "2,048 files may be open"),
    ],
)
def test_descriptors(look: Look, limit: int, severity: str, found: str) -> None:
    prefix = ["prlimit", f"--nofile={limit}:{limit}"]
    findings = look("host_limits.check_descriptors", prefix=prefix)
    assert found in one(findings, "descriptors", severity).found


def test_locked_memory(look: Look) -> None:
    prefix = ["prlimit", "--memlock=1048576:1048576"]
    findings = look("host_limits.check_locked_memory", prefix=prefix)
    assert "1.00 MiB may be locked" in one(findings, "locked memory", "ok").found


def test_memory_of_a_control_group(
    look: Look, cgroup: Callable[..., list[str]]
) -> None:
    prefix = cgroup("memory", {"memory.limit_in_bytes": 1 << 30})
    findings = look("host_memory.check_memory", {}, prefix=prefix)
    assert "allows 1.00 GiB" in one(findings, "memory", "ok").found
    model = str(CONFIGS / "llama-3-8b")
    too_much = {"kv_cache_gib": 4, "num_local_nodes": 2}
    found = one(
        look("host_memory.check_memory", too_much, model, prefix), "memory"
    ).found
    assert "the weights of llama-3-8b take 14.96 GiB" in found
    assert "2 local memory node(s) take 8.00 GiB" in found


def test_memory_without_limits(look: Look) -> None:
    findings = look("host_memory.check_memory", {"memory_nodes": "10.0.0.7:7600"})
    one(findings, "memory", "ok")


def test_cpu_quota(look: Look, cgroup: Callable[..., list[str]]) -> None:
    prefix = cgroup("cpu", {"cpu.cfs_quota_us": 50_000})
    findings = look("host_cpus.check_cpus", {}, prefix=prefix)
    assert "a quota of 0.5 CPUs" in one(findings, "CPUs", "ok").found
    assert "stops every thread" in one(findings, "CPUs", "warn").found


def test_cpus_that_are_not_there(look: Look) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    prefix = ["taskset", "-c", cpu]
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "auto", "OMP_NUM_THREADS": "64"}
    options = {"local_node_cpus": "9999"}
    findings = look("host_cpus.check_cpus", options, prefix=prefix, **variables)
    assert one(findings, "CPUs", "ok").found.startswith(f"1 ({cpu})")
    absent = one(findings, "CPUs")
    assert "local_node_cpus names CPU 9999" in absent.found
    assert absent.allowed == cpu
    assert "OMP_NUM_THREADS=64 for 1 CPUs" in one(findings, "CPUs", "warn").found


def test_cpus_of_workers_and_nodes(look: Look) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    variables = {"VLLM_CPU_OMP_THREADS_BIND": f"{cpu}|9999", "OMP_NUM_THREADS": "1"}
    findings = look("host_cpus.check_cpus", {"local_node_cpus": cpu}, **variables)
    assert "BIND names CPU 9999" in one(findings, "CPUs").found
    assert f"CPU {cpu} is of workers" in one(findings, "CPUs", "warn").found
    variables["VLLM_CPU_OMP_THREADS_BIND"] = "some"
    findings = look("host_cpus.check_cpus", {}, **variables)
    assert "'some' is not a list of CPUs" in one(findings, "CPUs").found


def test_numa_domains(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for domain, mine in enumerate((cpus[:1], cpus[1:])):
        (tmp_path / f"node{domain}").mkdir()
        text = ",".join(map(str, mine))
        (tmp_path / f"node{domain}" / "cpulist").write_text(text)
    findings = list(check_numa(tmp_path))
    if len(cpus) == 1:
        assert "all CPUs lie in one domain" in one(findings, "NUMA", "ok").found
        return
    finding = one(findings, "NUMA", "warn")
    assert "CPUs lie in domains 0, 1" in finding.found
    assert f"--cpus {cpus[0]}, --cpus" in finding.do


def test_huge_pages(look: Look) -> None:
    prefix = [sys.executable, "-c", _NO_HUGE_PAGES]
    findings = look("host_memory.check_huge_pages", prefix=prefix)
    assert "PR_SET_THP_DISABLE" in one(findings, "huge pages", "warn").found


def test_small_shared_memory(look: Look) -> None:
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("no mount namespace can be made here")
    findings = look("host_memory.check_shared_memory", prefix=prefix)
    found = one(findings, "/dev/shm", "warn").found
    assert found.startswith("64.00 MiB of 64.00 MiB are free")
    one(look("host_memory.check_shared_memory"), "/dev/shm", "ok")


def test_no_library(look: Look, tmp_path: Path) -> None:
    copy_package(tmp_path, without=["*.so"])
    findings = look("c_library.check_library", PYTHONPATH=str(tmp_path))
    assert "it was not built" in one(findings, "C library", "warn").found


def test_library_of_other_sources(look: Look, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    copy_package(tmp_path, without=["*.so"])
    source = tmp_path / "old.c"
    source.write_text("int ao_abi_version(void) { return 1; }\n")
    library = tmp_path / "vllm_attn_offload" / "native" / "_native.lib.so"
    subprocess.run([compiler, "-shared", "-o", library, source], check=True)
    findings = look("c_library.check_library", PYTHONPATH=str(tmp_path))
    assert "has interface version 1" in one(findings, "C library").found


def test_library(look: Look) -> None:
    findings = look("c_library.check_library")
    assert "kernels use" in one(findings, "C library", "ok").found


def test_plugin_is_hidden(look: Look) -> None:
    findings = look("host_software.check_plugin", VLLM_PLUGINS="other")
    finding = one(findings, "plugin")
    assert "VLLM_PLUGINS='other'" in finding.found
    assert finding.do.endswith("export VLLM_PLUGINS=other,attn_offload")
    one(look("host_software.check_plugin"), "plugin", "ok")


def test_plugin_without_metadata(look: Look, tmp_path: Path) -> None:
    """As where a checkout lies in PYTHONPATH and was never installed."""
    link_site_packages(tmp_path, without=["vllm_attn_offload"])
    copy_package(tmp_path)
    path = {"PYTHONPATH": str(tmp_path)}
    findings = look("host_software.check_plugin", flags=["-S"], **path)
    assert "no installed package names attn_offload" in one(findings, "plugin").found


def test_no_library_and_no_torch(look: Look, tmp_path: Path) -> None:
    link_site_packages(tmp_path, without=["vllm", "torch"])
    copy_package(tmp_path, without=["*.so"])
    path = {"PYTHONPATH": str(tmp_path)}
    findings = look("c_library.check_library", flags=["-S"], **path)
    assert "no torch in its place" in one(findings, "C library").found
