# SPDX-License-Identifier: Apache-2.0
"""Looks one after the other, at nodes and servers that fail meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from node_process import NodeProcess, running_node
from steady_worker import SteadyWorker
from stopped import stop_process

from vllm_attn_offload.status.look_taker import LookTaker
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials


def test_a_node_that_was_started_again_has_no_rates(tmp_path: Path) -> None:
    """Its counters began anew; the connection is made again."""
    options = ("--kv-cache-gib", "0.1", "--name", "again")
    taker = LookTaker([f"unix:{tmp_path}/node.sock"], "", NO_CREDENTIALS, 30.0)
    with running_node(tmp_path, *options):
        assert taker.look(has_rates=True).nodes[0].rates is None
        assert taker.look(has_rates=True).nodes[0].rates is not None
    (gone,) = taker.look(has_rates=True).nodes
    assert (gone.look.state, gone.rates) == ("no answer", None)
    with running_node(tmp_path, *options):
        (back,) = taker.look(has_rates=True).nodes
        assert (back.look.state, back.look.name) == ("serving", "again")
        assert back.rates is None
        assert taker.look(has_rates=True).nodes[0].rates is not None
    with running_node(tmp_path, *options):
        # Nobody looked while it was away.
        assert taker.look(has_rates=True).nodes[0].rates is None


def test_imbalance_of_rates_only(
    nodes: list[NodeProcess],
    addresses: list[str],
    work_on: Callable[[int], SteadyWorker],
) -> None:
    """What a node attended in its life is not compared with the others' last look."""
    workers = [work_on(0), work_on(1)]
    taker = LookTaker(addresses[:2], "", NO_CREDENTIALS, 2.0)

    def imbalance() -> float | None:
        for worker in workers:
            worker.step()
        return taker.look(has_rates=True).imbalance

    assert imbalance() is None
    assert imbalance() == pytest.approx(1.0, rel=0.9)
    stop_process(nodes[1].process.pid)
    try:
        (_, silent) = taker.look(has_rates=True).nodes
    finally:
        os.kill(nodes[1].process.pid, signal.SIGCONT)
    assert silent.look.state == "no answer"
    assert imbalance() is None
    assert imbalance() is not None


def test_a_token_file_that_is_missing_for_a_moment(
    addresses: list[str], tmp_path: Path
) -> None:
    """The look goes on, and says what is wrong."""
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text("0123456789abcdef" * 2)
    taker = LookTaker(addresses[:2], "", Credentials(str(token_file)), 10.0)
    token_file.unlink()
    for node in taker.look(has_rates=True).nodes:
        assert node.look.state == "refuses"
        assert f"{str(token_file)!r} cannot be read" in node.look.problem


def test_a_server_that_drips(addresses: list[str]) -> None:
    """One byte after the other is no answer; nodes are shown all the same."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_drip, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        taker = LookTaker(addresses[:1], url, NO_CREDENTIALS, 1.0)
        started = time.monotonic()
        for _ in range(2):
            report = taker.look(has_rates=True)
        assert time.monotonic() - started < 5
    assert report.engine is not None
    assert f"{url}: it did not answer within 1 s. Check" in report.engine.problem
    assert [node.look.name for node in report.nodes] == ["shelf-0"]


def _drip(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        with suppress(OSError):
            for _ in range(300):
                sock.sendall(b"#")
                time.sleep(0.1)
