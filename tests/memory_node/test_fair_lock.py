# SPDX-License-Identifier: Apache-2.0
"""Turns of FairLock are taken in the order in which they were asked for."""

from __future__ import annotations

import threading
import time

import pytest
from node_process import eventually

from vllm_attn_offload.memory_node.fair_lock import FairLock

ENGINE = "engine"


def test_turns_are_handed_over_in_order() -> None:
    turns = FairLock()
    taken: list[int] = []

    def take(number: int) -> None:
        with turns.turns_of(ENGINE):
            taken.append(number)

    with turns.turns_of(ENGINE):
        threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            assert eventually(lambda count=count: turns.num_waiting == count)
    for thread in threads:
        thread.join(5)
    assert taken == list(range(8))


def test_a_greedy_thread_waits_in_line() -> None:
    """Whoever releases and asks again at once is behind those who waited."""
    turns = FairLock()
    taken: list[str] = []
    is_over = threading.Event()

    def greedy() -> None:
        while not is_over.is_set():
            with turns.turns_of(ENGINE):
                taken.append("greedy")
                assert eventually(lambda: turns.num_waiting == 1 or is_over.is_set())

    with turns.turns_of(ENGINE):
        thread = threading.Thread(target=greedy)
        thread.start()
        assert eventually(lambda: turns.num_waiting == 1)
    for _ in range(10):
        with turns.turns_of(ENGINE):
            taken.append("other")
            # The greedy thread is back in line before the turn ends.
            assert eventually(lambda: turns.num_waiting == 1)
    is_over.set()
    thread.join(5)
    # The turn that was under way when it was asked, and no other.
    assert taken[:20] == 10 * ["greedy", "other"]


def test_an_engine_has_one_turn_for_all_its_sessions() -> None:
    turns = FairLock()
    taken: list[str] = []

    def take(engine: str) -> None:
        with turns.turns_of(engine):
            taken.append(engine)

    with turns.turns_of(ENGINE):
        threads = [
            threading.Thread(target=take, args=(engine,))
            for engine in [*64 * ["many"], *3 * ["few"]]
        ]
        for count, thread in enumerate(threads, 1):
            thread.start()
            assert eventually(lambda count=count: turns.num_waiting == count)
    for thread in threads:
        thread.join(5)
    assert taken == [*3 * ["many", "few"], *61 * ["many"]]


def test_one_at_a_time() -> None:
    turns = FairLock()
    inside = most = total = 0

    def work() -> None:
        nonlocal inside, most, total
        for _ in range(200):
            with turns.turns_of(ENGINE):
                inside += 1
                most = max(most, inside)
                total += 1
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, total) == (1, 800)


def test_turn_ends_with_an_exception() -> None:
    turns = FairLock()
    with pytest.raises(ValueError, match="inside"), turns.turns_of(ENGINE):
        raise ValueError("inside")
    with turns.turns_of(ENGINE):
        assert turns.num_waiting == 0
