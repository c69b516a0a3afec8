# SPDX-License-Identifier: Apache-2.0
"""What an executor makes of the outputs of all ranks when a node is lost."""

from __future__ import annotations

import pytest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.worker.lost_step import LossReader, LostStep

OUTPUT = ModelRunnerOutput(["r"], {"r": 0}, [[11]])
LOSS = MemoryNodeError("node", "it is gone.")


@pytest.mark.parametrize(
    ("outputs", "num_lost", "kept"),
    [
        pytest.param([OUTPUT, OUTPUT], 0, OUTPUT, id="no loss"),
        pytest.param(
            [OUTPUT, LostStep(None, 0, LOSS)],
            1,
            EMPTY_MODEL_RUNNER_OUTPUT,
            id="the other rank lost the step",
        ),
        pytest.param(
            [LostStep(OUTPUT, 0, LOSS), OUTPUT],
            1,
            EMPTY_MODEL_RUNNER_OUTPUT,
            id="this rank lost the step",
        ),
        pytest.param(
            [LostStep(OUTPUT, 0, LOSS, is_whole=True), OUTPUT],
            1,
            OUTPUT,
            id="lost while it drafted",
        ),
        pytest.param(
            [LostStep(OUTPUT, 0, LOSS, is_whole=True), LostStep(None, 0, LOSS)],
            2,
            EMPTY_MODEL_RUNNER_OUTPUT,
            id="the other rank lost it before",
        ),
        pytest.param(
            [None, LostStep(None, 0, LOSS)], 1, None, id="sampled in a second call"
        ),
    ],
)
def test_output(outputs: list[object], num_lost: int, kept: object) -> None:
    reported: list[LostStep] = []
    assert LossReader(reported.append).aggregate(outputs) is kept
    assert len(reported) == num_lost
