# SPDX-License-Identifier: Apache-2.0
"""One offloading engine measured with several values of ``num_microbatches``."""

from __future__ import annotations

from typing import Any

from engines.launch import EngineProcess, as_option

from vllm_attn_offload.attention.micro_batch.choice import (
    MicroBatchChoice,
    NumMicroBatches,
)


class EngineMode:
    """An engine with one value of the option; its contexts are prefilled once for all.

    Args:
        engine: Shared by all modes.
        option: Value of ``num_microbatches``.
    """

    def __init__(self, engine: EngineProcess, option: str) -> None:
        self.name = f"offload {option}"
        self._engine = engine
        self._option = as_option(option)

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request that the engine answers in this mode."""
        self._engine.ask({"micro_batches": self._option})
        return self._engine.ask(request)


def choose(worker: Any, option: NumMicroBatches) -> None:
    """Runs in the worker: steps are split by this option from now on.

    Every option keeps its own choice, because ``auto`` learns.
    """
    runner = worker._micro_batches
    choices = runner.__dict__.setdefault("choices_by_option", {})
    if option not in choices:
        choices[option] = MicroBatchChoice(option, runner._choice._agree)
    runner._choice = choices[option]


def node_addresses(worker: Any) -> list[str]:
    """Runs in the worker: where its memory nodes listen."""
    return [client.address for client in worker._nodes._clients]
