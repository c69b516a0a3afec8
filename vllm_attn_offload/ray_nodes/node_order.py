# SPDX-License-Identifier: Apache-2.0
"""What is ordered of Ray: a memory node of a size, on a host with resources."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Ray's own resources, which have names of their own in its calls.
_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
_DEFAULT_RESOURCES = {"memory_node": 1.0}
#: Ray counts resources in such parts.
_PART = 1e-4


@dataclass(frozen=True, slots=True)
class NodeOrder:
    """A memory node to be placed; travels to the actor that starts it.

    Attributes:
        kv_cache_gib: Budget of the node, in GiB.
        device: ``cpu`` or ``cuda``.
        resources: Asked of Ray, amounts by name; None: one ``memory_node``.
        auth_token: Token that the node asks for.
        startup_timeout_s: Deadline for its process to be ready.
    """

    kv_cache_gib: float
    device: str
    resources: Mapping[str, float] | None
    auth_token: bytes = field(repr=False)
    startup_timeout_s: float

    @property
    def needed(self) -> dict[str, float]:
        """Resources of a host that the node needs, with a GPU for ``cuda``."""
        asked = dict(self.resources or _DEFAULT_RESOURCES)
        if self.device == "cuda":
            asked.setdefault("GPU", 1.0)
        return asked

    def fits(self, free: Mapping[str, float]) -> bool:
        """Whether ``free`` holds what is needed."""
        return all(free.get(name, 0) >= amount for name, amount in self.needed.items())

    def num_in(self, free: Mapping[str, float]) -> int:
        """How many such nodes ``free`` holds."""
        return min(
            round(free.get(name, 0) / _PART) // max(1, round(amount / _PART))
            for name, amount in self.needed.items()
        )

    def actor_options(self) -> dict[str, Any]:
        """The needed resources in the words of an actor's ``options``."""
        options: dict[str, Any] = {"num_cpus": 0, "resources": {}}
        for name, amount in self.needed.items():
            if name == "memory":
                options[name] = int(amount)
            elif name in _OPTIONS:
                options[_OPTIONS[name]] = amount
            else:
                options["resources"][name] = amount
        return options


def new_token() -> bytes:
    """Make a token for the nodes of an engine or of a pool."""
    return secrets.token_hex(32).encode()


def written(resources: Mapping[str, float]) -> str:
    """Write resources for people, in the order of their names."""
    return ", ".join(f"{name} {resources[name]:g}" for name in sorted(resources))
