# SPDX-License-Identifier: Apache-2.0
"""What is to be looked at: an engine's options, its model, and how it is asked."""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.planner.model.shape import ModelShape

#: transformers, which reads it, is imported meanwhile; a hub may take far longer.
_SHAPE_WAIT_S = 15.0
_GPU_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the command.

    Attributes:
        config: Options of attention offloading.
        options: The same as they were given, for the engine.
        model: Path or name; empty: none was given.
        engine_options: Of ``vllm serve``, besides.
        shape: Of the model, once it is read; None without a model.
        timeout_s: Deadline for every answer of a node.
        is_probing: Whether layers are exchanged with the nodes and timed.
        shape_due: When other checks go on without the shape, as time.monotonic().
    """

    config: AttentionOffloadConfig
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    engine_options: tuple[str, ...] = ()
    shape: Future[ModelShape] | None = None
    timeout_s: float = 5.0
    is_probing: bool = False
    shape_due: float = field(default_factory=lambda: time.monotonic() + _SHAPE_WAIT_S)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Nodes that run somewhere already."""
        return self.config.addresses + self.config.standby_nodes

    @property
    def starts_nodes(self) -> bool:
        """Whether the engine starts nodes on this host."""
        return not self.config.memory_nodes

    @property
    def is_engine_host(self) -> bool:
        """Whether an engine can run here, and not memory nodes alone."""
        return find_spec("vllm") is not None

    @property
    def computes_on_cpus(self) -> bool:
        """Whether an engine of this host would; a GPU is what it takes first."""
        return self.is_engine_host and not _GPU_DRIVER.exists()

    def model_shape(self) -> ModelShape | None:
        """Return the model's sizes, or None where there are none to be had in time."""
        if self.shape is None:
            return None
        wait([self.shape], max(0.0, self.shape_due - time.monotonic()))
        if not self.shape.done() or self.shape.exception() is not None:
            return None
        return self.shape.result()
