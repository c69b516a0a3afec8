# SPDX-License-Identifier: Apache-2.0
"""The options of attention offloading, as users set them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from vllm_attn_offload.transport.address import Address

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Key of ``VllmConfig.additional_config`` that carries the options.
CONFIG_KEY = "attention_offload"


@dataclass(
    frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
)
class AttentionOffloadConfig:
    """Attention offloading: memory nodes own the KV cache and run attention."""

    memory_nodes: tuple[str, ...] = ()
    """Addresses of running memory nodes (HOST:PORT or unix:PATH). Empty: start local
    ones."""
    num_local_nodes: int = Field(default=1, ge=1)
    """How many memory nodes to start on this host when memory_nodes is empty."""
    local_node_cpus: str = ""
    """CPUs of a local memory node, such as "8-15". Empty: half of the host's cores, or
    those that the workers are not bound to."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """KV cache of this engine on each node, in GiB. Unset: all that is free there; a
    local node then holds half of the memory that is available at start."""
    startup_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline for a memory node to start or to answer for the first time."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline for every answer of a memory node while serving."""

    @model_validator(mode="after")
    def _check(self) -> AttentionOffloadConfig:
        for address in self.memory_nodes:
            Address.parse(address)
        num_nodes = len(self.memory_nodes) or self.num_local_nodes
        if num_nodes != 1:
            raise ValueError(
                f"{num_nodes} memory nodes were given; this release serves an engine "
                "from exactly 1. Give one address in memory_nodes, or none and "
                "num_local_nodes=1."
            )
        return self

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AttentionOffloadConfig:
        """Read options as they come from the command line or ``additional_config``.

        Raises:
            ValueError: An unknown key or a bad value; the message says what is
                allowed.
        """
        allowed = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(options, Mapping):
            raise ValueError(
                f"attention offloading was given {options!r} as its options. Allowed: "
                "an object; write {} for the defaults. Valid options: "
                f"{', '.join(allowed)}."
            )
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ValueError(
                f"attention-offload-config has no option {', '.join(unknown)}. "
                f"Valid options: {', '.join(allowed)}."
            )
        try:
            return cls(**options)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'options'}: {item['msg']} "
                f"(given: {item['input']!r})"
                for item in error.errors(include_url=False)
            )
            raise ValueError(
                f"attention-offload-config is wrong. {problems}. Valid options: "
                f"{', '.join(allowed)}."
            ) from error

    @classmethod
    def from_additional_config(
        cls, additional_config: object
    ) -> AttentionOffloadConfig | None:
        """Options of an engine, or None where attention is not offloaded."""
        if not isinstance(additional_config, dict):
            return None
        options = additional_config.get(CONFIG_KEY)
        return None if options is None else cls.from_dict(options)

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig) -> AttentionOffloadConfig:
        """Options of an engine that offloads.

        The patch-free command line may name executor and worker and no options.
        """
        return cls.from_additional_config(vllm_config.additional_config) or cls()
