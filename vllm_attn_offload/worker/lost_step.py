# SPDX-License-Identifier: Apache-2.0
"""How a worker tells the executor that a step ran without a memory node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LostStep:
    """Takes the place of a step's output; what it holds is wrong.

    ``generation`` names the sessions that were in use.
    """

    output: Any
    generation: int
    node: str
    cause: str


class LossReader:
    """Reads every rank's output, because a loss may be seen by one of them only.

    It stands where vLLM aggregates the outputs of KV connectors
    (``Executor.kv_output_aggregator``), which are refused with attention offloading.

    Args:
        report: Called with each lost step, before its output is used.
    """

    def __init__(self, report: Callable[[LostStep], None]) -> None:
        self._report = report

    def aggregate(self, outputs: list[Any], output_rank: int = 0) -> Any:
        """The output of one rank, as vLLM expects it."""
        for output in outputs:
            if isinstance(output, LostStep):
                self._report(output)
        output = outputs[output_rank]
        return output.output if isinstance(output, LostStep) else output
