# SPDX-License-Identifier: Apache-2.0
"""Output of a step that ran without a memory node, from worker to executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from vllm_attn_offload.errors import MemoryNodeError


@dataclass(frozen=True, slots=True)
class LostStep:
    """Takes the place of a step's output; what it holds is wrong.

    ``generation`` names the sessions that were in use. ``is_whole``: the step's tokens
    are right, because they were drawn before the loss; only drafts came after it.
    """

    output: Any
    generation: int
    error: MemoryNodeError
    is_whole: bool = False


class LossReader:
    """Reads every rank's output, because a loss may be seen by one of them only.

    It stands where vLLM aggregates the outputs of KV connectors
    (``Executor.kv_output_aggregator``), which are refused with attention offloading.

    Args:
        report: Called with each lost step, before its output is used.
    """

    def __init__(self, report: Callable[[LostStep], None]) -> None:
        self._report = report

    def ft_defer_kv_connector_outputs(self, outputs: list[Any]) -> None:
        """Do nothing: vLLM 0.33 keeps here what KV connectors of lost workers left."""

    def aggregate(self, outputs: list[Any], output_rank: int = 0) -> Any:
        """The output of one rank; an empty one where any rank lost the step.

        Tokens that were drawn are kept: dropped, a seeded request would draw others.
        """
        lost = [output for output in outputs if isinstance(output, LostStep)]
        for step in lost:
            self._report(step)
        output = outputs[output_rank]
        if isinstance(output, LostStep):
            output = output.output
        is_wrong = not all(step.is_whole for step in lost)
        return EMPTY_MODEL_RUNNER_OUTPUT if is_wrong and output is not None else output
