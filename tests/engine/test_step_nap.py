# SPDX-License-Identifier: Apache-2.0
"""The engine's thread sleeps through steps, and late answers are not repeated."""

from __future__ import annotations

import time

import pytest

from vllm_attn_offload.engine.step_nap import StepNap

_STEP_S = 0.05


def _step(nap: StepNap, step_s: float) -> tuple[float, float]:
    """Wait, as vLLM does, for an answer that comes after a time.

    Returns:
        Seconds that passed, and the CPU time that they took.
    """
    began, cpu = time.monotonic(), time.thread_time()

    def get_response() -> str:
        while time.monotonic() < began + step_s:
            continue
        return "tokens"

    assert nap.wait(get_response) == "tokens"
    return time.monotonic() - began, time.thread_time() - cpu


def test_like_steps_are_slept_through() -> None:
    nap = StepNap()
    for _ in range(4):
        _step(nap, _STEP_S)
    steps = [_step(nap, _STEP_S) for _ in range(6)]
    assert min(cpu for _, cpu in steps) < 0.5 * _STEP_S


def test_shorter_steps_are_waited_for_awake_after_one() -> None:
    nap = StepNap()
    for _ in range(5):
        _step(nap, _STEP_S)
    overslept, _ = _step(nap, 0.0)
    assert overslept >= 0.5 * _STEP_S
    assert min(_step(nap, 0.0)[0] for _ in range(3)) < 0.5 * _STEP_S


def test_an_error_of_a_step_reaches_the_engine() -> None:
    nap = StepNap()

    def fail() -> None:
        raise TimeoutError("RPC call to execute_model timed out.")

    with pytest.raises(TimeoutError, match="execute_model"):
        nap.wait(fail)
    assert _step(nap, 0.0)[0] < _STEP_S
