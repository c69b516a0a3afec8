# SPDX-License-Identifier: Apache-2.0
"""Options of attention offloading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import Credentials, check_complete

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
    """Addresses of running memory nodes: HOST:PORT, [IPV6]:PORT or unix:PATH. Empty:
    start local ones."""
    num_local_nodes: int = Field(default=1, ge=1, le=64)
    """Number of memory nodes to start on this host when memory_nodes is empty."""
    local_node_cpus: str = ""
    """CPUs of the local memory nodes, such as 8-15. Unset: half of the host's cores, or
    those that the workers are not bound to."""
    partition: Literal["heads", "blocks", "auto"] = "auto"
    """What is divided between several memory nodes. heads: each node holds some KV
    heads of every block; the number of KV heads must be a multiple of the number of
    nodes. blocks: each node holds some blocks, in proportion to its capacity. auto:
    heads where they divide evenly, otherwise blocks."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """KV cache of this engine on each node, in GiB; each data-parallel rank is an
    engine. Unset: all free memory of the node, divided by the data-parallel size; local
    nodes together hold half of the memory that is available at start."""
    num_microbatches: Literal[1, 2, "auto"] = 1
    """Number of parts of a decode step; one computes while the other waits for its
    attention. auto: 2 where measured step times show that it is faster; 1 on GPUs and
    with several tensor-parallel ranks."""
    on_node_loss: Literal["recover", "fail"] = "recover"
    """What happens when a memory node is lost. recover: it is restarted, reconnected or
    replaced, and running requests are computed again. fail: the engine stops."""
    standby_nodes: tuple[str, ...] = ()
    """Addresses of running memory nodes, each of which can replace a lost node that
    stays away. A standby needs as much free memory as the node that it replaces."""
    startup_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline for a memory node to start or to answer for the first time."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline for every answer of a memory node while serving. A node that is silent
    for longer counts as lost; attention gets more time the more KV cache it reads."""
    recovery_timeout_s: float = Field(default=120.0, gt=0)
    """Deadline for a lost memory node to be back or replaced; then the engine stops.
    Must be below VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."""
    unavailable_grace_s: float = Field(default=10.0, ge=0)
    """Time that the pool may be without a lost memory node before new requests are
    refused with status 503 and Retry-After; running ones wait. /health answers 503 at
    once."""
    auth_token_file: str = ""
    """File with the token of the memory nodes' --auth-token-file. Only its path is part
    of the configuration; it is read for every connection."""
    tls_cert: str = ""
    """Certificate of this host (PEM), for memory nodes with --tls-cert."""
    tls_key: str = ""
    """Private key of tls_cert (PEM)."""
    tls_ca: str = ""
    """Authority (PEM) that signed the certificates of this host and of the nodes."""

    @model_validator(mode="after")
    def _check(self) -> AttentionOffloadConfig:
        addresses = (*self.memory_nodes, *self.standby_nodes)
        for address in addresses:
            Address.parse(address)
        if twice := sorted({a for a in addresses if addresses.count(a) > 1}):
            raise ValueError(
                f"memory_nodes and standby_nodes name {', '.join(twice)} more than "
                "once. Allowed: every node once. Remove the repetition."
            )
        names = ("tls_cert", "tls_key", "tls_ca")
        check_complete({name: getattr(self, name) for name in names})
        return self

    @property
    def credentials(self) -> Credentials:
        """Files with the token and certificates; every connection reads them anew."""
        return Credentials(
            self.auth_token_file, self.tls_cert, self.tls_key, self.tls_ca
        )

    @property
    def open_nodes(self) -> list[str]:
        """Remote nodes that anybody may use: with a token they would ask for it."""
        nodes = () if self.auth_token_file else self.memory_nodes + self.standby_nodes
        return [each for each in nodes if not Address.parse(each).is_local]

    @property
    def num_nodes(self) -> int:
        """Number of memory nodes that serve the engine at a time."""
        return len(self.memory_nodes) or self.num_local_nodes

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AttentionOffloadConfig:
        """Check options from the command line or ``additional_config``.

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
        """Return an engine's options, or None if attention is not offloaded."""
        if not isinstance(additional_config, dict):
            return None
        options = additional_config.get(CONFIG_KEY)
        return None if options is None else cls.from_dict(options)

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig) -> AttentionOffloadConfig:
        """Return the options of an engine that offloads attention.

        The patch-free command line may name executor and worker without options.
        """
        return cls.from_additional_config(vllm_config.additional_config) or cls()
