# SPDX-License-Identifier: Apache-2.0
"""Every listed variant compiles for every GPU within the README's resources."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
README = HERE.parents[1] / "triton_kernels" / "README.md"
PROCESSES = 2
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}
REGISTERS_PER_SM = 65536
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
RESERVED_PER_CTA = 1024  # shared memory that the driver takes


def read_limits() -> dict[str, tuple[int, int]]:
    """Variant -> (registers, bytes of shared memory) from the README's table."""
    rows = re.findall(
        r"^\| `([\w-]+)` \| (\d+) \| ([\d,]+) \|", README.read_text("utf-8"), re.M
    )
    return {name: (int(r), int(s.replace(",", ""))) for name, r, s in rows}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # Other processes, because this one may have defined the kernels for the
    # interpreter; an empty cache, so that nothing stale passes.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    running = []
    for part in range(PROCESSES):
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        running.append(
            subprocess.Popen(
                [
                    *(sys.executable, str(HERE / "compile_variants.py")),
                    *(str(part), str(PROCESSES)),
                ],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    rows = []
    for process in running:
        output, _ = process.communicate(timeout=540)
        assert process.returncode == 0
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


def test_every_variant_is_compiled_for_every_architecture(
    compiled: list[dict[str, Any]],
) -> None:
    pairs = {(row["name"], row["architecture"]) for row in compiled}
    expected = {(name, arch) for name in read_limits() for arch in ARCHITECTURES}
    assert pairs == expected
    assert len(compiled) == len(pairs) <= 60


def test_variants_stay_within_their_resources(compiled: list[dict[str, Any]]) -> None:
    limits = read_limits()
    over = [
        row
        for row in compiled
        if row["registers"] > limits[row["name"]][0]
        or row["shared_bytes"] > limits[row["name"]][1]
        or row["spilled_bytes"]
    ]
    assert over == []


def test_variants_load_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if not row["loads_of_16_bytes"]] == []


def test_the_planned_number_of_ctas_fits_an_sm(compiled: list[dict[str, Any]]) -> None:
    crowded = []
    for row in compiled:
        registers = row["registers"] * row["threads"] * row["ctas_per_sm"]
        shared = (row["shared_bytes"] + RESERVED_PER_CTA) * row["ctas_per_sm"]
        fits = shared <= SHARED_PER_SM[row["architecture"]]
        if registers > REGISTERS_PER_SM or not fits:
            crowded.append(row)
    assert crowded == []


def test_limits_fail_when_registers_double(compiled: list[dict[str, Any]]) -> None:
    limits = read_limits()
    largest: dict[str, int] = {}
    for row in compiled:
        name = row["name"]
        largest[name] = max(largest.get(name, 0), row["registers"])
    # From 128 on, doubling passes the hardware's 255, and the spills fail instead.
    loose = [
        n for n, used in largest.items() if used < 128 and limits[n][0] >= 2 * used
    ]
    assert loose == []
