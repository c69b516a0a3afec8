# SPDX-License-Identifier: Apache-2.0
"""The catalogue is complete, and user files and strings are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_attn_offload.planner.hardware.catalogue import (
    Catalogue,
    load_catalogue,
    parse_devices,
    parse_network,
)
from vllm_attn_offload.planner.hardware.device_count import common_price_list

REQUIRED = (
    "A10 A100 H100 H200 H20 B200 L4 L40S RTX3090 RTX4080 RTX4090 TPUv6e "
    "CPU-DDR5-2ch CPU-DDR5-8ch CPU-DDR5-12ch"
)


def test_catalogue_is_complete_and_sourced(catalogue: Catalogue) -> None:
    assert set(REQUIRED.split()) <= set(catalogue.devices)
    for device in catalogue.devices.values():
        assert device.source
        assert device.date
        assert device.price
        for price in device.price.values():
            assert price.usd_per_hour > 0
            assert price.source
            assert price.date


def test_user_file_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[device.H100]\ntflops = 1\nmemory_gb = 2\nmemory_gbps = 3\n"
        'source = "s"\ndate = "d"\ngemm_curve = [[1, 0.5], [8, 0.7]]\n'
        '[network.lab]\ngbps = 10\nlatency_us = 20\nsource = "s"\ndate = "d"\n'
    )
    catalogue = load_catalogue([path])
    assert catalogue.device("h100").gemm_curve == ((1.0, 0.5), (8.0, 0.7))
    assert catalogue.device("H20").memory_gb == 96
    assert parse_network("lab", catalogue).latency_us == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[device.X]\nspeed = 1\n", "unknown keys speed"),
        ("[device.X]\ntflops = 1\n", "lacks date, memory_gb"),
        ("[device.X]\ntflops = -1\n", "tflops = -1 is not possible"),
        ("[device.X]\nmemory_gbps = 0\n", "more than zero"),
        ('[device.X]\ntflops = "fast"\n', "is no number"),
        ("[device.X]\ngemm_curve = [[8, 1], [1, 1]]\n", "gemm_curve is wrong"),
        ('[network.X]\ngbps = true\nsource = "s"\n', "is no number"),
        ("[network.X]\nlatency_us = 5\n", "lacks gbps"),
        ("[device", "Cannot read hardware file"),
    ],
)
def test_user_file_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_catalogue([path])


def test_parse_devices(catalogue: Catalogue) -> None:
    devices = parse_devices("2xrtx 4090", catalogue)
    assert (devices.count, devices.device.name) == (2, "RTX4090")
    assert parse_devices("H20", catalogue).count == 1


@pytest.mark.parametrize("text", ["0xH20", "2xH21", "", "-1xH20"])
def test_parse_devices_errors(catalogue: Catalogue, text: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown device|Cannot read"):
        parse_devices(text, catalogue)


@pytest.mark.parametrize(
    ("text", "gbps"), [("400Gbps", 400), ("25GbE", 25), ("50GB/s", 400), ("10Gb/s", 10)]
)
def test_parse_network(catalogue: Catalogue, text: str, gbps: float) -> None:
    assert parse_network(text, catalogue).gbps == gbps


@pytest.mark.parametrize("text", ["fast", "0Gbps", "400", "-1Gbps"])
def test_parse_network_errors(catalogue: Catalogue, text: str) -> None:
    with pytest.raises(ValueError, match="Cannot read"):
        parse_network(text, catalogue)


def test_common_price_list(catalogue: Catalogue) -> None:
    d = catalogue.devices
    assert common_price_list([d["H100"], d["H20"]]) == "lamina-table-1"
    assert common_price_list([d["H100"], d["RTX3090"]]) == "cloud-2026"
    assert common_price_list([d["A100"], d["H20"]]) is None
