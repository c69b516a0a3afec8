# SPDX-License-Identifier: Apache-2.0
"""CPU quotas of containers and services, from the kernel's files."""

from __future__ import annotations

import math
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vllm_attn_offload.engine.cpu_quota import cpu_quota

CGROUPS = Path("/sys/fs/cgroup")
QUOTA_FILES = {
    "v1": (
        CGROUPS / "cpu",
        {"cpu.cfs_period_us": "50000", "cpu.cfs_quota_us": "75000"},
    ),
    "v2": (CGROUPS, {"cpu.max": "75000 50000"}),
}
SCRIPT = """
import os, sys
with open(sys.argv[1], "w") as procs:
    procs.write(str(os.getpid()))
from vllm_attn_offload.engine.cpu_quota import cpu_quota
print(cpu_quota())
"""


@pytest.fixture(params=["v1", "v2"])
def limited_group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group of this kernel that may use 1.5 CPUs."""
    mount, files = QUOTA_FILES[request.param]
    group = mount / f"attn-offload-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        for name, text in files.items():
            if not (group / name).exists():
                pytest.skip(f"no {name} here")
            (group / name).write_text(text)
        yield group / "inner"
    except OSError as error:
        pytest.skip(str(error))
    finally:
        for directory in (group / "inner", group):
            with suppress(OSError):
                directory.rmdir()


def test_quota_of_the_kernel(limited_group: Path) -> None:
    """Also where a group around that of the process has the quota."""
    limited_group.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(limited_group / "cgroup.procs")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert float(process.stdout) == 1.5


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000", 2), ("50000 100000", 0.5), ("max 100000", math.inf)],
)
def test_version_2(text: str, expected: float, tmp_path: Path) -> None:
    """A container sees its own group at the mount, whatever it is called outside."""
    write(tmp_path, cpu__max=text, groups="0::/../outside")
    assert cpu_quota(tmp_path, tmp_path / "groups") == expected
    assert cpu_quota(tmp_path, tmp_path / "nothing") == expected


@pytest.mark.parametrize(("quota", "expected"), [("150000", 1.5), ("-1", math.inf)])
def test_version_1(quota: str, expected: float, tmp_path: Path) -> None:
    write(tmp_path / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    write(tmp_path, groups="4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc")
    assert cpu_quota(tmp_path, tmp_path / "groups") == expected


def test_smallest_of_nested_groups(tmp_path: Path) -> None:
    """Of a service in a slice, without a namespace of its own."""
    write(tmp_path / "a.slice", cpu__max="300000 100000")
    write(tmp_path / "a.slice" / "b.service", cpu__max="800000 100000")
    write(tmp_path, groups="0::/a.slice/b.service")
    assert cpu_quota(tmp_path, tmp_path / "groups") == 3


def test_nothing_to_read(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "nothing") == math.inf
    write(tmp_path, cpu__max="")
    assert cpu_quota(tmp_path, tmp_path / "nothing") == math.inf
