# SPDX-License-Identifier: Apache-2.0
"""What engines show API servers of themselves, and how it gets there."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry

from vllm_attn_offload.engine.engine_board import ENGINE_BOARD_VARIABLE, EngineBoard
from vllm_attn_offload.engine.engine_report import EngineReport
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.metrics import EngineCollector
from vllm_attn_offload.metrics.engine import ENGINE_METRICS
from vllm_attn_offload.metrics.engine_state import EngineState

LOSS = MemoryNodeError("node", "it is gone.")


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> EngineBoard:
    monkeypatch.setenv(ENGINE_BOARD_VARIABLE, "")  # restored with what is set now
    return EngineBoard.create()


@pytest.mark.parametrize("name", ["org/model", "m" * 5000, "\0" * 5000, "模" * 5000])
def test_reads_what_was_written(board: EngineBoard, name: str) -> None:
    """In processes that find it, of all engines; of a long name its begin."""
    found = EngineBoard.find()
    assert found is not None
    assert found.read() == []
    states = [EngineState(name, index, 3, True, 2, 1.5, 0.5, 9, 99) for index in (0, 2)]
    for state in states:
        board.write(EngineState("other", state.engine_index))
        board.write(state)
    read = found.read()
    assert [each.engine_index for each in read] == [0, 2]
    assert {each.model_name for each in read} == {name[:1000]}
    assert all(each.num_pool_blocks == 99 and each.is_recovering for each in read)


def test_all_that_is_listed_is_exported(board: EngineBoard) -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector(board.read))
    board.write(EngineState("model", 1, 3, True, 2, 1.5, 0.5, 9, 99))
    labels = {"model_name": "model", "engine_index": "1"}
    shown = [registry.get_sample_value(m.sample, labels) for m in ENGINE_METRICS]
    assert shown == [3, 1, 2, 1.5, 0.5, 9, 99]


def test_recovery_of_an_engine_that_computes() -> None:
    shown = [EngineState("model", 0)]
    report = EngineReport(shown[0], shown.append)
    report.open_pool(50)
    report.begin_recovery(LOSS)
    assert shown[-1].is_recovering
    report.note_reopened()
    assert not shown[-1].is_recovering
    time.sleep(0.2)  # the step in flight ends late
    report.note_dropped()
    report.note_recomputed(7)
    assert shown[-1].num_recoveries == 0
    report.end_recovery(4)
    last = shown[-1]
    assert (last.generation, last.num_recoveries) == (4, 1)
    assert (last.num_recomputed_tokens, last.num_pool_blocks) == (7, 50)
    assert last.last_recovery_s == last.recovery_s > 0.2
    report.end_recovery(5)  # of none
    assert shown[-1] == last


def test_time_without_requests_is_no_recovery() -> None:
    """An engine that has nothing to do takes its new sessions with the next request."""
    shown = [EngineState("model", 0)]
    report = EngineReport(shown[0], shown.append)
    started = time.monotonic()
    report.begin_recovery(LOSS)
    report.note_reopened()
    reopened_s = time.monotonic() - started
    time.sleep(0.5)
    dropped = time.monotonic()
    report.note_dropped()
    report.end_recovery(1)
    attached_s = time.monotonic() - dropped
    assert shown[-1].num_recoveries == 1
    assert shown[-1].last_recovery_s <= reopened_s + attached_s


def test_loss_while_workers_are_attached_is_the_same_recovery() -> None:
    shown = [EngineState("model", 0)]
    report = EngineReport(shown[0], shown.append)
    for _ in range(2):
        report.begin_recovery(LOSS)
        assert shown[-1].is_recovering
        report.note_reopened()
    report.end_recovery(2)
    assert (shown[-1].generation, shown[-1].num_recoveries) == (2, 1)
