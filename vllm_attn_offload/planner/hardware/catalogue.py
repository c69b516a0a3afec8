# SPDX-License-Identifier: Apache-2.0
"""The catalogue of devices and networks, and how the command line names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.hardware.read_hardware import read_hardware

CATALOGUE_PATH = Path(__file__).with_name("catalogue.toml")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All known devices and networks by name."""

    devices: Mapping[str, Device]
    networks: Mapping[str, Network]

    def device(self, name: str) -> Device:
        """Look a device up by name, ignoring case and spaces.

        Raises:
            ValueError: The device is unknown.
        """
        wanted = name.replace(" ", "").lower()
        for known, device in self.devices.items():
            if known.lower() == wanted:
                return device
        raise ValueError(
            f"Unknown device {name!r}. Known: {', '.join(sorted(self.devices))}. "
            "Use one of these, or describe yours in a TOML file and pass --hardware."
        )


def load_catalogue(extra: Sequence[Path] = ()) -> Catalogue:
    """The packaged catalogue; later files in `extra` replace entries by name.

    Raises:
        ValueError: A file is missing, not TOML, or has wrong keys.
    """
    devices: dict[str, Device] = {}
    networks: dict[str, Network] = {}
    for path in (CATALOGUE_PATH, *extra):
        more_devices, more_networks = read_hardware(path)
        devices.update(more_devices)
        networks.update(more_networks)
    return Catalogue(devices, networks)


def parse_devices(text: str, catalogue: Catalogue) -> DeviceCount:
    """Parse `2xH20` (or `H20` for one).

    Raises:
        ValueError: Bad syntax, count below 1, or unknown device.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(\S.*?)\s*", text)
    if match is None or match[1] == "0":
        raise ValueError(
            f"Cannot read {text!r} as devices. The form is COUNTxNAME with COUNT >= 1, "
            "for example 2xH20. Correct it."
        )
    return DeviceCount(catalogue.device(match[2]), int(match[1] or 1))


def parse_network(text: str, catalogue: Catalogue) -> Network:
    """Parse `400Gbps`, `25GbE`, `50GB/s`, or a name from the catalogue.

    Raises:
        ValueError: None of these forms.
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
