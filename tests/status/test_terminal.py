# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload status` on a terminal: a real pseudo-terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hostile_node import hostile_node
from steady_worker import SteadyWorker
from terminal import Terminal, running_on_terminal

ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
CTRL_C = b"\x03"

OnTerminal = Callable[..., AbstractContextManager[Terminal]]


@pytest.fixture
def on_terminal(command: Path) -> OnTerminal:
    """Runs ``status`` there."""
    return lambda *arguments, **size: running_on_terminal(
        command, "status", *arguments, **size
    )


def test_one_look(addresses: list[str], on_terminal: OnTerminal) -> None:
    """Tables, in place, and the command ends."""
    with on_terminal(*addresses, "127.0.0.1:1") as terminal:
        assert terminal.end() == 1
    text = terminal.written.decode()
    assert "4 of 5 memory nodes serve" in text
    assert "shelf-3" in text
    assert addresses[3] in text
    assert "no answer" in text
    assert ENTER_SCREEN not in terminal.written


def test_watch(
    addresses: list[str],
    on_terminal: OnTerminal,
    work_on: Callable[[int], SteadyWorker],
) -> None:
    """Rates while a worker works; Ctrl-C gives the terminal back."""
    worker = work_on(1)
    worker.step()
    with on_terminal(*addresses, "--watch", "0.2") as terminal:
        terminal.read_until(lambda written: b"shelf-3" in written)
        terminal.written = b""

        def has_rates(written: bytes) -> bool:
            worker.step()
            return b"KiB" in written and b" %" in written

        terminal.read_until(has_rates)
        assert b"attended/s" in terminal.written
        terminal.press(CTRL_C)
        terminal.read_until(lambda written: LEAVE_SCREEN in written)
        assert terminal.end() == 0
    assert b"Traceback" not in terminal.written


def test_a_small_terminal(
    addresses: list[str],
    on_terminal: OnTerminal,
    work_on: Callable[[int], SteadyWorker],
) -> None:
    """Problems are seen before a screen ends, and columns are whole or left out."""
    dead = "127.0.0.1:1"
    for index in range(4):
        work_on(index).step()
    arguments = (*addresses, dead, "--watch", "0.2")
    with on_terminal(*arguments, columns=80, rows=16) as terminal:
        terminal.read_until(lambda written: b" KiB" in written or b" %" in written)
        terminal.press(CTRL_C)
        terminal.read_until(lambda written: LEAVE_SCREEN in written)
        assert terminal.end() == 1
    text = terminal.written.decode()
    assert f"{dead}: cannot connect" in text
    assert "attended/s" in text
    assert "busy" in text
    assert "kernel" not in text
    assert "…" not in text.partition("cannot connect")[2].partition("engine")[0]


def test_a_hostile_node(
    on_terminal: OnTerminal,
) -> None:
    """What rich writes is all that reaches the terminal."""
    with hostile_node() as address, on_terminal(address) as terminal:
        assert terminal.end() == 0
    assert b"\x1b]0;" not in terminal.written
    assert b"\x07" not in terminal.written
    assert b"\x1b[2J" not in terminal.written
    text = terminal.written.decode()
    assert "\u202e" not in text
    assert "[bold red]shelf[/]" in text
