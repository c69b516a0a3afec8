# SPDX-License-Identifier: Apache-2.0
"""Devices, networks and prices: the catalogue, user TOML files, and `2xH20` strings."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

CATALOGUE_PATH = Path(__file__).with_name("hardware.toml")
NOT_NUMBERS = frozenset(("source", "date", "price", "gemm_curve", "attention_only"))
ABOVE_ZERO = frozenset(
    ("tflops", "memory_gb", "memory_gbps", "link_gbps", "gbps", "usd_per_hour")
    + ("attention_gbps", "attention_tflops", "efficiency", "compute_efficiency")
    + ("memory_efficiency", "attention_efficiency")
)


@dataclass(frozen=True, slots=True)
class Price:
    """One price of one device: USD per device and hour, where from, and when."""

    usd_per_hour: float
    source: str
    date: str


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU host.

    `tflops` is dense BF16 (1e12 flop/s), `memory_gb` 1e9 bytes, `memory_gbps` and
    `link_gbps` 1e9 bytes/s (link: one direction, inside one host). The efficiencies
    scale datasheet peaks; a device measured by `calibrate` carries `gemm_curve`
    (rows, seconds per 1e9 bytes of weights) and `attention_gbps` instead.
    Overheads: once per step and per request of a step (scheduling, sampling), once per
    layer on the compute side, once per layer call and per request of it on the side
    that attends. `attention_only` marks a memory node that runs no model.
    Default efficiencies: attention 0.7 is Lamina (arXiv 2405.01814) Figure 3; the
    other two, and 2 us for a hop inside a host, are assumptions.
    """

    name: str
    tflops: float
    memory_gb: float
    memory_gbps: float
    source: str
    date: str
    link_gbps: float = 32.0
    link_latency_us: float = 2.0
    power_w: float | None = None
    compute_efficiency: float = 0.75
    memory_efficiency: float = 0.85
    attention_efficiency: float = 0.7
    step_overhead_us: float = 0.0
    row_overhead_us: float = 0.0
    layer_overhead_us: float = 0.0
    attention_call_us: float = 0.0
    attention_row_us: float = 0.0
    attention_gbps: float | None = None
    attention_tflops: float | None = None
    gemm_curve: tuple[tuple[float, float], ...] = ()
    attention_only: bool = False
    price: Mapping[str, Price] = field(default_factory=dict)

    def ideal(self) -> Device:
        """The datasheet roofline: every efficiency 1, no overheads, no measurements."""
        return replace(
            self,
            compute_efficiency=1.0,
            memory_efficiency=1.0,
            attention_efficiency=1.0,
            link_latency_us=0.0,
            step_overhead_us=0.0,
            row_overhead_us=0.0,
            layer_overhead_us=0.0,
            attention_call_us=0.0,
            attention_row_us=0.0,
            attention_gbps=None,
            attention_tflops=None,
            gemm_curve=(),
        )


@dataclass(frozen=True, slots=True)
class Network:
    """A network port: `gbps` is 1e9 *bits* per second, `latency_us` one round trip.

    Defaults: what NCCL reached on 400 Gbps in Lamina (arXiv 2405.01814v2) section 5,
    35.5 of 50 GB/s and 66.6 us.
    """

    name: str
    gbps: float
    latency_us: float = 66.6
    efficiency: float = 0.71
    source: str = ""
    date: str = ""

    @property
    def bytes_per_s(self) -> float:
        """Usable bytes per second of one port in one direction."""
        return self.gbps * 1e9 / 8 * self.efficiency


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """`count` devices of one kind, for example 2xH20."""

    device: Device
    count: int

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All known devices and networks by name."""

    devices: Mapping[str, Device]
    networks: Mapping[str, Network]

    def device(self, name: str) -> Device:
        """Look a device up by name, ignoring case and spaces.

        Raises:
            ValueError: the device is unknown.
        """
        wanted = name.replace(" ", "").lower()
        for known, device in self.devices.items():
            if known.lower() == wanted:
                return device
        raise ValueError(
            f"Unknown device {name!r}. Known: {', '.join(sorted(self.devices))}. "
            "Use one of these, or describe yours in a TOML file and pass --hardware."
        )


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


def read_hardware(path: Path) -> Catalogue:
    """Read one hardware TOML file.

    Raises:
        ValueError: the file is missing, not TOML, or has wrong keys.
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
    return Catalogue(devices, networks)


def load_catalogue(extra: Sequence[Path] = ()) -> Catalogue:
    """The packaged catalogue; later files in `extra` replace entries by name."""
    devices: dict[str, Device] = {}
    networks: dict[str, Network] = {}
    for path in (CATALOGUE_PATH, *extra):
        part = read_hardware(path)
        devices.update(part.devices)
        networks.update(part.networks)
    return Catalogue(devices, networks)


def parse_group(text: str, catalogue: Catalogue) -> DeviceGroup:
    """Parse `2xH20` (or `H20` for one).

    Raises:
        ValueError: bad syntax, count below 1, or unknown device.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(\S.*?)\s*", text)
    if match is None or match[1] == "0":
        raise ValueError(
            f"Cannot read {text!r} as devices. The form is COUNTxNAME with COUNT >= 1, "
            "for example 2xH20. Correct it."
        )
    return DeviceGroup(catalogue.device(match[2]), int(match[1] or 1))


def parse_network(text: str, catalogue: Catalogue) -> Network:
    """Parse `400Gbps`, `25GbE`, `50GB/s`, or a name from the catalogue.

    Raises:
        ValueError: none of these forms.
    """
    if text in catalogue.networks:
        return catalogue.networks[text]
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(Gbps|Gb/s|GbE|GB/s)\s*", text)
    if match is None or float(match[1]) == 0:
        named = ", ".join(sorted(catalogue.networks))
        raise ValueError(
            f"Cannot read {text!r} as a network. Allowed: a positive number with Gbps, "
            f"Gb/s, GbE or GB/s, or one of {named}. For example 400Gbps."
        )
    scale = 8.0 if match[2] == "GB/s" else 1.0
    return Network(text.strip(), float(match[1]) * scale)


def common_price_list(devices: Sequence[Device]) -> str | None:
    """The first price list that prices every device, or None."""
    for name in devices[0].price if devices else ():
        if all(name in device.price for device in devices):
            return name
    return None


def groups_price(groups: Sequence[DeviceGroup], price_list: str | None) -> float | None:
    """USD per hour of all `groups`, or None if one of their devices has no price."""
    if not all(group.device.price for group in groups):
        return None
    return sum(g.count * price_per_hour(g.device, price_list) for g in groups)


def price_per_hour(device: Device, price_list: str | None) -> float:
    """USD per hour of one device; without a common list, its first price.

    Raises:
        ValueError: the device has no price.
    """
    if price_list is not None and price_list in device.price:
        return device.price[price_list].usd_per_hour
    if not device.price:
        raise ValueError(
            f"{device.name} has no price. Cost needs one price per device. "
            f"Pass --price {device.name}=USD_PER_HOUR or add it to your hardware file."
        )
    return next(iter(device.price.values())).usd_per_hour
