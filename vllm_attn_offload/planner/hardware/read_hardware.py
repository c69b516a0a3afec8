# SPDX-License-Identifier: Apache-2.0
"""Hardware TOML files: [device.NAME] and [network.NAME] tables, checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_attn_offload.planner.hardware.device import Device, Price
from vllm_attn_offload.planner.hardware.network import Network

NOT_NUMBERS = frozenset(("source", "date", "price", "gemm_curve", "attention_only"))
ABOVE_ZERO = frozenset(
    ("tflops", "memory_gb", "memory_gbps", "link_gbps", "gbps", "usd_per_hour")
    + ("attention_gbps", "efficiency", "compute_efficiency")
    + ("memory_efficiency", "attention_efficiency")
)


def read_hardware(path: Path) -> tuple[dict[str, Device], dict[str, Network]]:
    """Devices and networks of one hardware TOML file, by name.

    Raises:
        ValueError: The file is missing, not TOML, or has wrong keys.
    """
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"Cannot read hardware file {path}: {error}. It must be a TOML file with "
            "[device.NAME] and [network.NAME] tables. Check the path and the syntax."
        ) from error
    devices = {
        name: _parse_device(name, table, f"{path.name}: [device.{name}]")
        for name, table in document.get("device", {}).items()
    }
    networks = {
        name: _parse_network(name, table, f"{path.name}: [network.{name}]")
        for name, table in document.get("network", {}).items()
    }
    return devices, networks


def _checked(table: Mapping[str, Any], kind: type, where: str) -> dict[str, Any]:
    known = {f.name for f in fields(kind)} - {"name"}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(
            f"{where} has unknown keys {', '.join(unknown)}. Allowed: "
            f"{', '.join(sorted(known))}. Remove or correct them."
        )
    for key, value in table.items():
        _check_value(key, value, where)
    return dict(table)


def _check_value(key: str, value: object, where: str) -> None:
    """Numbers are numbers, and nothing is negative or divided by zero."""
    if key in NOT_NUMBERS:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"{where}: {key} = {value!r} is no number. It must be one, without quotes. "
            "Correct the value."
        )
    if not 0 <= value < float("inf") or (value == 0 and key in ABOVE_ZERO):
        least = "more than zero" if key in ABOVE_ZERO else "zero or more"
        raise ValueError(
            f"{where}: {key} = {value} is not possible. It must be {least}. Correct "
            "the value."
        )


def _parse_curve(points: Any, where: str) -> tuple[tuple[float, float], ...]:
    try:
        curve = tuple((float(rows), float(seconds)) for rows, seconds in points)
    except (TypeError, ValueError):
        curve = ((0.0, 0.0),)
    rows = [r for r, _ in curve]
    if rows != sorted(set(rows)) or any(value <= 0 for pair in curve for value in pair):
        raise ValueError(
            f"{where}: gemm_curve is wrong. It must be a list of [rows, seconds per "
            "1e9 bytes of weights], above zero and with rising rows. Correct it, or "
            "run vllm-attn-offload calibrate."
        )
    return curve


def _parse_device(name: str, table: Mapping[str, Any], where: str) -> Device:
    values = _checked(table, Device, where)
    prices = values.pop("price", {})
    values["price"] = {
        key: _parse_price(entry, f"{where}.price.{key}")
        for key, entry in prices.items()
    }
    values["gemm_curve"] = _parse_curve(values.pop("gemm_curve", ()), where)
    _require(("tflops", "memory_gb", "memory_gbps", "source", "date"), values, where)
    return Device(name=name, **values)


def _parse_price(table: Mapping[str, Any], where: str) -> Price:
    values = _checked(table, Price, where)
    _require(("usd_per_hour", "source", "date"), values, where)
    return Price(**values)


def _parse_network(name: str, table: Mapping[str, Any], where: str) -> Network:
    values = _checked(table, Network, where)
    _require(("gbps",), values, where)
    return Network(name, **values)


def _require(needed: Sequence[str], values: Mapping[str, Any], where: str) -> None:
    missing = sorted(set(needed) - set(values))
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}. Needed are {', '.join(needed)}. Add "
            "what is missing."
        )
