# SPDX-License-Identifier: Apache-2.0
"""The unit: accepted by systemd, and its command tells it how the node does."""

from __future__ import annotations

import configparser
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest
from harness.processes import free_port
from helm_chart import DEPLOY
from node_process import COMMAND

from vllm_attn_offload.memory_node.args import parse_options

UNIT = DEPLOY / "systemd" / "vllm-memory-node@.service"
#: Of `systemd-analyze security`, in tenths; above 50 it calls a service exposed.
MAX_EXPOSURE = "30"

needs_systemd = pytest.mark.skipif(
    not which("systemd-analyze"), reason="needs systemd-analyze (.ci/deploy-tools)"
)


def service() -> configparser.SectionProxy:
    """The section of that name."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text().replace("\\\n", ""))
    return unit["Service"]


def unit_command(instance: str, **changes: str) -> list[str]:
    """``ExecStart`` as systemd expands it for an instance, with its file's lines."""
    pairs = service()["Environment"].split()
    variables = dict(pair.split("=", 1) for pair in pairs) | changes
    words: list[str] = []
    for word in service()["ExecStart"].split():
        word = word.replace("%H", socket.gethostname()).replace("%i", instance)
        if name := re.fullmatch(r"\$(\w+)", word):
            words += variables[name[1]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], word))
    return words


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[socket.socket]:
    """Stands where systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(30)
        yield sock


def until(sock: socket.socket, field: str) -> None:
    """Receive messages up to one with the field."""
    while field not in sock.recv(4096).decode().splitlines():
        continue


@needs_systemd
def test_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    """With the installed command in place of the one that a user installs."""
    unit = tmp_path / UNIT.name
    program = service()["ExecStart"].split()[0]
    unit.write_text(UNIT.read_text().replace(program, shlex.quote(str(COMMAND))))
    security = ("security", "--offline=yes", f"--threshold={MAX_EXPOSURE}")
    for options in (("verify", "--man=no"), security):
        ended = subprocess.run(
            ["systemd-analyze", "--no-pager", *options, unit],
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert unit.name not in ended.stderr


def test_command() -> None:
    """Options exist, and further ones reach the node."""
    program, *options = unit_command(
        "0",
        CREDENTIALS_DIRECTORY="/run/credentials/vllm-memory-node@0.service",
        OPTIONS="--attention-kernel cpp --preallocate",
    )
    assert Path(program).name == COMMAND.name
    parsed = parse_options(options)
    assert parsed.name == f"{socket.gethostname()}/0"
    assert not parsed.listen[0].is_local
    assert parsed.metrics_listen.is_local
    assert parsed.auth_token_file == "/run/credentials/vllm-memory-node@0.service/token"
    assert parsed.attention_kernel == "cpp"
    assert parsed.preallocate
    assert service()["LoadCredential"].startswith("token:")


def test_a_place_for_a_socket() -> None:
    """What the unit says about sockets names the place that it may write to."""
    (listen,) = re.findall(r"LISTEN=(unix:\S+)", UNIT.read_text())
    assert listen.rpartition("/")[0] == f"unix:/run/{service()['RuntimeDirectory']}"
    assert service()["ProtectSystem"] == "strict"
    command = unit_command("0", CREDENTIALS_DIRECTORY="/x", LISTEN=listen)
    (parsed,) = parse_options(command[1:]).listen
    assert parsed.is_local


def test_node_is_a_notify_service(notifications: socket.socket, tmp_path: Path) -> None:
    """It says that it serves, feeds the watchdog, and says that it stops."""
    assert service()["Type"] == "notify"
    (watchdog_s,) = re.findall(r"^(\d+)s$", service()["WatchdogSec"])
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("x" * 32)
    arguments = unit_command(
        "0",
        CREDENTIALS_DIRECTORY=str(tmp_path),
        LISTEN=f"127.0.0.1:{free_port()}",
        METRICS=f"127.0.0.1:{free_port()}",
        KV_CACHE_GIB="0.1",
    )[1:]
    variables = {
        "NOTIFY_SOCKET": notifications.getsockname(),
        # A hundredth of the unit's, so that the second message comes soon.
        "WATCHDOG_USEC": str(int(watchdog_s) * 10_000),
    }
    node = subprocess.Popen([COMMAND, *arguments], env=variables)
    try:
        until(notifications, "READY=1")
        for _ in range(2):
            until(notifications, "WATCHDOG=1")
        node.send_signal(signal.SIGTERM)
        until(notifications, "STOPPING=1")
        assert node.wait(10) == 0
    finally:
        node.kill()
        node.wait()
