# SPDX-License-Identifier: Apache-2.0
"""Options of attention offloading."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from vllm_attn_offload.option_types import (
    Addresses,
    Allowed,
    Count,
    Cpus,
    Device,
    FilePath,
    Gib,
    MicroBatches,
    NodeLoss,
    Nodes,
    PartitionOption,
    Resources,
    Seconds,
    SecondsOrZero,
)
from vllm_attn_offload.ray_options import check_ray_options, ray_pool
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import Credentials, check_complete

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from vllm.config import VllmConfig

#: Key of ``VllmConfig.additional_config`` that carries the options.
CONFIG_KEY = "attention_offload"


#: Set for workers that have the CPUs of their local nodes.
COMMON_CPUS_VARIABLE = "ATTN_OFFLOAD_COMMON_CPUS"


@dataclass(
    frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
)
class AttentionOffloadConfig:
    """Attention offloading: memory nodes own the KV cache and run attention."""

    memory_nodes: Nodes = ()
    """Addresses of running memory nodes: HOST:PORT, [IPV6]:PORT or unix:PATH. ray: Ray
    places nodes for this engine alone. ray:NAME: the pool that 'vllm-attn-offload ray
    up NAME' made, which engines share. Empty: start local ones."""
    num_local_nodes: Count = 1
    """Number of memory nodes to start on this host when memory_nodes is empty."""
    local_node_cpus: Cpus = ""
    """CPUs of the local memory nodes, such as 8-15; several nodes divide them in order,
    or share all where there are fewer CPUs than nodes. Unset: all cores, which the
    worker has as well, because one waits while the other works; half of the cores where
    both work at the same time, which is with num_microbatches 2 and with several ranks;
    those that the workers are not bound to, where
    VLLM_CPU_OMP_THREADS_BIND binds them, and any with nobind. Under a CPU quota, such
    as a container's, nodes and workers together get as many CPUs as it allows, and
    unbound nodes as many."""
    partition: PartitionOption = "auto"
    """What is divided between several memory nodes. heads: each node holds some KV
    heads of every block; the number of KV heads must be a multiple of the number of
    nodes. blocks: each node holds some blocks, in proportion to its capacity. auto:
    heads where they divide evenly, otherwise blocks."""
    ray_nodes: Count = 1
    """Number of nodes that Ray places with memory_nodes ray."""
    ray_device: Device = "cpu"
    """What holds the blocks of these nodes: cpu, or cuda, which asks Ray for a GPU for
    each."""
    ray_resources: Resources = None
    """What each of these nodes asks Ray for, by resource; CPU, GPU and memory (bytes)
    are Ray's own. Unset: {"memory_node": 1}. A placement group of the engine with such
    bundles is used; otherwise nodes are spread over the hosts that have them."""
    kv_cache_gib: Gib = None
    """KV cache of this engine on each node, in GiB; each data-parallel rank is an
    engine. Needed with memory_nodes ray, whose nodes get this size. Unset: all free
    memory of the node, divided by the data-parallel size; local nodes together hold
    half of the memory that is available at start."""
    resident_state_gib: Gib = None
    """Recurrent states of a hybrid model (Mamba, linear attention, short convolutions)
    on each compute rank, in GiB; they do not leave it. Unset: as many as max_num_seqs
    requests hold, with prefix caching four times as many, or what half of the free
    memory holds."""
    num_microbatches: MicroBatches = "auto"
    """Number of parts of a decode step; one computes while the other waits for its
    attention. auto: 2 where measured step times show that it is faster; 1 on GPUs. A
    worker that shares its CPUs with its local memory node leaves half of them to it
    meanwhile, with --enforce-eager; a compiled or quantized model's steps stay whole
    there."""
    on_node_loss: NodeLoss = "recover"
    """What happens when a memory node is lost. recover: it is restarted, reconnected or
    replaced, and running requests are computed again. fail: the engine stops."""
    standby_nodes: Addresses = ()
    """Addresses of running memory nodes, each of which can replace a lost node that
    stays away. A standby needs as much free memory as the node that it replaces."""
    startup_timeout_s: Seconds = 60.0
    """Deadline for a memory node to start or to answer for the first time."""
    request_timeout_s: Seconds = 30.0
    """Deadline for every answer of a memory node while serving. A node that is silent
    for longer counts as lost; attention gets more time the more KV cache it reads."""
    recovery_timeout_s: Seconds = 120.0
    """Deadline for a lost memory node to be back or replaced; then the engine stops.
    Must be below VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS."""
    unavailable_grace_s: SecondsOrZero = 10.0
    """Time that the pool may be without a lost memory node before new requests are
    refused with status 503 and Retry-After; running ones wait. /health answers 503 at
    once."""
    auth_token_file: FilePath = ""
    """File with the token of the memory nodes' --auth-token-file. Only its path is part
    of the configuration; it is read for every connection."""
    tls_cert: FilePath = ""
    """Certificate of this host (PEM), for memory nodes with --tls-cert."""
    tls_key: FilePath = ""
    """Private key of tls_cert (PEM)."""
    tls_ca: FilePath = ""
    """Authority (PEM) that signed the certificates of this host and of the nodes."""

    @model_validator(mode="after")
    def _check(self) -> AttentionOffloadConfig:
        check_ray_options(self)
        addresses = (*self.addresses, *self.standby_nodes)
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
        nodes = () if self.auth_token_file else self.addresses + self.standby_nodes
        return [each for each in nodes if not Address.parse(each).is_local]

    @property
    def ray_pool(self) -> str | None:
        """Pool of Ray that memory_nodes names; empty: one of the engine's own."""
        return ray_pool(self.memory_nodes)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses that memory_nodes names."""
        return self.memory_nodes if self.ray_pool is None else ()

    def without_files(self) -> dict[str, Any]:
        """Return the options by name, without files, which are a host's own."""
        files = {field.name for field in dataclasses.fields(Credentials)}
        options = dataclasses.asdict(self)
        return {name: options[name] for name in options if name not in files}

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
        given = spelled_alike(options)
        if unknown := sorted(set(given) - set(allowed)):
            raise ValueError(
                f"attention-offload-config has no option {', '.join(unknown)}. "
                f"{_nearest(unknown, allowed)}Valid options: {', '.join(allowed)}."
            )
        try:
            return cls(**given)
        except ValidationError as error:
            found = error.errors(include_url=False)
            problems = {item["loc"][:1]: cls._problem(item) for item in found}
            raise ValueError(
                f"attention-offload-config is wrong. {' '.join(problems.values())}"
            ) from None  # its traceback says the same in pydantic's words

    @classmethod
    def _problem(cls, item: ErrorDetails) -> str:
        """Say what is wrong in the words of the option, not of its type."""
        if not item["loc"]:
            return str(item["ctx"]["error"])
        name = str(item["loc"][0])
        field: FieldInfo = vars(cls)["__pydantic_fields__"][name]
        (allowed,) = (each for each in field.metadata if isinstance(each, Allowed))
        return (
            f"{name} was given {written(item['input'])}. Allowed: {allowed.text}. "
            f"Write for example {name}: {allowed.example}."
        )

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


def _nearest(unknown: list[str], allowed: list[str]) -> str:
    """Ask for the options that were meant, where they can be guessed."""
    meant = [get_close_matches(name, allowed, 1, 0.7) for name in unknown]
    names = ", ".join(name for names in meant for name in names)
    return f"Did you mean {names}? " if names else ""


def spelled_alike(options: Mapping[str, Any]) -> dict[str, Any]:
    """Write all names with underscores.

    Raises:
        ValueError: An option stands there twice, once with hyphens.
    """
    alike: dict[str, Any] = {}
    for name, value in options.items():
        spelled = str(name).replace("-", "_")
        if spelled in alike:
            raise ValueError(
                f"{spelled} was given twice, with - and with _. Allowed: one of the "
                "two spellings. Remove the other."
            )
        alike[spelled] = value
    return alike


def written(value: object) -> str:
    """Write a value as JSON and YAML do; YAML has more types, such as dates."""
    return json.dumps(value, default=str)
