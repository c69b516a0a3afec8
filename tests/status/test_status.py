# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload status`: what nodes say, and in time where they say nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness.processes import free_port
from hostile_node import hostile_node
from node_process import NodeProcess, running_node
from steady_worker import NUM_BLOCKS, SteadyWorker
from terminal import heed_ctrl_c

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.commands import main

#: Nobody listens there.
DEAD = "127.0.0.1:1"
#: These move between two answers of a node that does nothing else.
MOVING = ("uptime_s", "num_connections", "num_minor_faults", "num_major_faults")


@pytest.fixture
def status(command: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command as in a pipe."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, "status", *arguments], capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def silent() -> Iterator[list[str]]:
    """Hosts that accept connections and never answer."""
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for _ in range(4)
        ]
        yield [f"127.0.0.1:{each.getsockname()[1]}" for each in listeners]


def test_four_nodes_and_a_dead_one(
    addresses: list[str], status: Any, work_on: Callable[[int], SteadyWorker]
) -> None:
    """One plain line each, and one for the session."""
    work_on(2).step()
    alive = status(*addresses)
    assert (alive.returncode, alive.stderr) == (0, "")
    done = status(*addresses, DEAD)
    assert (done.returncode, done.stderr) == (1, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    for index, address in enumerate(addresses):
        assert lines[index].startswith(f"node shelf-{index}  {address}  serving  ")
        assert (
            f"sessions {int(index == 2)}  attended {2 * (index == 2)}  in "
            in (lines[index])
        )
    assert lines[4] == f"node {DEAD}  {DEAD}  no answer"
    assert lines[5].startswith("session engine-")
    assert f"  node shelf-2  transport tcp  blocks {NUM_BLOCKS}  KV " in lines[5]
    assert lines[6].startswith(f"note  {DEAD}: cannot connect")


def test_silence_costs_one_timeout(
    addresses: list[str], silent: list[str], status: Any
) -> None:
    """Not one each."""
    started = time.monotonic()
    done = status(*silent, addresses[0], "--timeout-s", "2")
    assert time.monotonic() - started < 2 * len(silent) - 1
    assert done.returncode == 1
    assert done.stdout.count("  no answer") == len(silent)
    assert "it did not answer within 2 s. Check" in done.stdout
    assert "node shelf-0" in done.stdout


def test_json_is_what_the_node_says(
    addresses: list[str], status: Any, work_on: Callable[[int], SteadyWorker]
) -> None:
    """All of it, under its own names."""
    worker = work_on(0)
    worker.step()
    done = status(addresses[0], addresses[1], "--json")
    document = json.loads(done.stdout)
    with closing(ControlClient(addresses[0], 10)) as client:
        expected = msgspec.to_builtins(client.stats())
    shown = document["nodes"][0]["stats"]
    for name in MOVING:
        assert shown.pop(name) <= expected.pop(name) or name == "num_connections"
    assert shown == expected
    assert shown["sessions"][0]["counters"]["num_layer_calls"] == 2
    assert document["nodes"][0]["name"] == "shelf-0"
    assert document["nodes"][0]["rates"] is None
    # Only one of them has a session.
    assert document["imbalance"] is None
    assert abs(document["time"] - time.time()) < 60


def test_watch_writes_rates_of_what_happened(
    addresses: list[str], command: Path, work_on: Callable[[int], SteadyWorker]
) -> None:
    """One JSON object a line; the counters' differences are those of the rates."""
    workers = [work_on(0), work_on(1)]
    arguments = ["status", *addresses[:2], "--watch", "0.2", "--json"]
    with subprocess.Popen(
        [command, *arguments], stdout=subprocess.PIPE, preexec_fn=heed_ctrl_c
    ) as watch:
        assert watch.stdout is not None
        first = json.loads(watch.stdout.readline())
        assert [node["rates"] for node in first["nodes"]] == [None, None]
        for worker in (workers[0], *workers):
            worker.step()
        looks = [first]
        while attended(looks[-1]) != [6, 2] and len(looks) < 100:
            looks.append(json.loads(watch.stdout.readline()))
        watch.send_signal(signal.SIGINT)
        assert watch.wait(30) == 0
    gained = [0.0, 0.0]
    for look in looks[1:]:
        for index, node in enumerate(look["nodes"]):
            rates = node["rates"]
            gained[index] += rates["attended_tokens_per_s"] * rates["seconds"]
            assert rates["busy"] >= 0
            (session,) = node["session_rates"]
            assert session["attended_tokens_per_s"] == rates["attended_tokens_per_s"]
    assert gained == pytest.approx([6 - attended(first)[0], 2 - attended(first)[1]])


def attended(look: dict[str, Any]) -> list[int]:
    """Attended tokens of each node's sessions."""
    return [
        sum(s["counters"]["num_attended_tokens"] for s in node["stats"]["sessions"])
        for node in look["nodes"]
    ]


def test_imbalance(
    addresses: list[str], status: Any, work_on: Callable[[int], SteadyWorker]
) -> None:
    """Of nodes with sessions: 2 + 4 tokens in two layers against 2."""
    workers = [work_on(0), work_on(1)]
    for worker in (workers[0], *workers):
        worker.step()
    document = json.loads(status(*addresses, "--json").stdout)
    assert document["imbalance"] == pytest.approx(6 / 4)
    assert "\nnote  imbalance 1.50: " in status(*addresses).stdout


def test_tokens(tmp_path: Path, status: Any) -> None:
    """A node that we do not convince answers, and is not counted as serving."""
    files = [tmp_path / "right", tmp_path / "wrong"]
    for file in files:
        file.touch(mode=0o600)
        file.write_text(file.name * 10)
    token = ("--auth-token-file", str(files[0]))
    node = NodeProcess("127.0.0.1:0", tmp_path / "log", "--kv-cache-gib", "0.1", *token)
    try:
        none = status(node.address)
        wrong = status(node.address, "--auth-token-file", str(files[1]))
        right = status(node.address, *token)
    finally:
        node.kill()
    for done in (none, wrong):
        assert done.returncode == 1
        assert f"  {node.address}  refuses\n" in done.stdout
    assert "it asks for a token, and none was given" in none.stdout
    assert right.returncode == 0
    assert ": refused: token 1\n" in right.stdout


def test_a_hostile_node_writes_nothing_to_the_terminal(status: Any) -> None:
    """Neither control characters nor markup, and its numbers break nothing."""
    with hostile_node() as address:
        plain, as_json = status(address), status(address, "--json")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert all(line.isprintable() for line in plain.stdout.splitlines())
    assert "\\x1b]0;owned\\x07" in plain.stdout
    assert "node [bold red]shelf[/]  " in plain.stdout
    assert max(map(len, plain.stdout.splitlines())) < 600
    assert as_json.stdout.strip().isprintable()
    (node,) = json.loads(as_json.stdout)["nodes"]
    assert node["stats"]["sessions"][0]["counters"]["attend_s"] is None


def test_nodes_of_an_engine(tmp_path: Path, status: Any) -> None:
    """Those that its /metrics name; a node's own page names that node."""
    port = free_port()
    options = ("--kv-cache-gib", "0.1", "--metrics-listen", f"127.0.0.1:{port}")
    with running_node(tmp_path, *options, "--name", "alone") as node:
        done = status("--engine", f"127.0.0.1:{port}")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"node alone  {node.address}  serving  ")
    gone = status("--engine", f"http://127.0.0.1:{port}/metrics", "--json")
    assert gone.returncode == 1
    document = json.loads(gone.stdout)
    assert document["nodes"] == document["engines"] == []
    assert f"http://127.0.0.1:{port}: it does not answer" in document["engine_problem"]


def test_a_server_without_nodes(tmp_path: Path, status: Any) -> None:
    """Text of Prometheus without ours, and what is no such text."""
    for text, problem in (
        ("process_cpu_seconds_total 1.0\n", "names no memory nodes"),
        ("<html>\n", "is no text of Prometheus"),
    ):
        (tmp_path / "metrics").write_text(text)
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            done = status("--engine", f"http://127.0.0.1:{server.server_port}")
            server.shutdown()
        assert done.returncode == 1
        assert problem in done.stdout


def test_a_reader_that_has_enough(addresses: list[str], command: Path) -> None:
    """`status --watch | head -1` ends without a traceback."""
    shell = f'"{command}" status {addresses[0]} --watch 0.1 | head -1'
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "no ADDRESS and no --engine was given"),
        (("nonsense",), "'nonsense' is not an address"),
        (("--watch", "127.0.0.1:7600"), "Write addresses before this option"),
        (("--engine", "ftp://host"), "is no URL of a server"),
        (("--engine", "http://host:port"), "is no URL of a server"),
        ((DEAD, "--tls-cert", "x"), "Give the missing ones: --tls-key, --tls-ca"),
        ((DEAD, "--auth-token-file", "/nowhere"), "'/nowhere' cannot be read"),
    ],
)
def test_bad_input(
    arguments: Sequence[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(["status", *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_status_imports_no_torch(command: Path) -> None:
    """Which would take most of the half second that it may need."""
    script = (
        "import sys\nfrom vllm_attn_offload.commands import main\n"
        f"assert main(['status', '{DEAD}']) == 1\n"
        "assert not {'torch', 'vllm', 'numpy', 'pydantic'} & set(sys.modules)\n"
    )
    python = Path(os.path.realpath(command)).with_name("python")
    subprocess.run([python, "-c", script], check=True, capture_output=True, timeout=60)
