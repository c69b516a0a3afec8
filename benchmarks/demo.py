# SPDX-License-Identifier: Apache-2.0
"""Serves a small real model with its attention on a memory node and asks it a question.

``make demo`` runs this. It starts ``vllm serve … --attention-offload``, streams one
answer through the OpenAI client, prints what was exchanged, and stops everything.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import httpx
import psutil
from harness.processes import ManagedProcess, ProcessError, free_port, log_tail
from harness.smollm2 import prepare
from openai import OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape

SERVED_NAME = "smollm2"
QUESTION = "What is the capital of France, and what is it known for?"
MAX_TOKENS = 96
ORPHAN_GRACE_S = 5
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
METRICS = (
    "attn_offload:memory_node_kv_blocks",
    "attn_offload:compute_worker_kv_bytes",
    "attn_offload:bytes_sent_total",
    "attn_offload:bytes_received_total",
)


class ServerError(RuntimeError):
    """The server did not answer or stop as it should."""


class _Server(ManagedProcess):
    start_timeout_s = 900.0
    stop_timeout_s = 15.0


def main() -> int:
    """Run the demo; return the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(highlight=False, soft_wrap=True)
    log = Path(tempfile.mkdtemp(prefix="vllm-attn-offload-demo-"), "server.log")
    try:
        _run(log, console)
    except (RuntimeError, httpx.HTTPError, OpenAIError) as error:
        _print_failure(console, error, log)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything is stopped.")
        shutil.rmtree(log.parent)
        return 130
    shutil.rmtree(log.parent)
    return 0


def _run(log: Path, console: Console) -> None:
    model = prepare()
    port = free_port()
    command = _serve_command(model, port)
    base_url = f"http://127.0.0.1:{port}"
    console.print(f"[1/3] Starting the server (log: {log})", markup=False)
    console.print(f"      {shlex.join(command)}", markup=False)
    with _running_server(command, log, base_url) as server:
        _wait_until_ready(server, log, console)
        console.print(f"[2/3] Asking: {QUESTION}", markup=False)
        gaps_ms = _stream_answer(base_url)
        metrics = _read_metrics(base_url)
    console.print("[3/3] Stopped; no process is left.", markup=False)
    _print_summary(console, gaps_ms, metrics)
    variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    console.print("\nTo keep the server running:")
    console.print(f"  {variables} {shlex.join(command)}", markup=False)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _serve_command(model: Path, port: int) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    return [
        *(str(vllm), "serve", str(model), "--attention-offload", "--enforce-eager"),
        *("--max-model-len", "4096", "--served-model-name", SERVED_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


@contextmanager
def _running_server(command: list[str], log: Path, url: str) -> Iterator[_Server]:
    # Orphans below this process become its children, so that none escapes _stop.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = _Server(
        "The server",
        command,
        log,
        health_url=f"{url}/health",
        variables=ENVIRONMENT,
        own_session=True,
    )
    try:
        yield server
    except BaseException:
        _stop(server)
        raise
    if problem := _stop(server):
        raise ServerError(problem)


def _stop(server: _Server) -> str:
    """End the server and all below it; say what did not end by itself, if anything."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # a second Ctrl-C must not leak processes
    problem = ""
    if server.stop() == -signal.SIGKILL:
        # vLLM heeds no SIGTERM while its engine starts.
        allowed_s = server.stop_timeout_s
        problem = f"The server did not stop within {allowed_s:g} s and was killed."
    else:
        deadline = time.monotonic() + ORPHAN_GRACE_S
        while (left := _live_children()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            problem = f"The server left processes behind (killed now): pid {pids}."
    _kill_children()
    return problem


def _kill_children() -> None:
    # Once the others are gone, Python's resource tracker removes what they shared.
    spare_tracker_until = time.monotonic() + ORPHAN_GRACE_S
    while left := _live_children():
        for process in left:
            with suppress(psutil.NoSuchProcess):
                is_tracker = "resource_tracker" in " ".join(process.cmdline())
                if not is_tracker or time.monotonic() > spare_tracker_until:
                    process.kill()
        time.sleep(0.1)


def _live_children() -> list[psutil.Process]:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return psutil.Process().children(recursive=True)


def _wait_until_ready(server: _Server, log: Path, console: Console) -> None:
    started = time.monotonic()
    next_report_s = 0
    with console.status("starting") as status:

        def report() -> None:
            nonlocal next_report_s
            waited_s = int(time.monotonic() - started)
            last = "".join(log.read_text("utf-8", errors="replace").splitlines()[-1:])
            line = f"{waited_s:4d} s  {last:.100}"
            status.update(escape(line))
            if not console.is_terminal and waited_s >= next_report_s:
                console.print(f"      {line}", markup=False)
                next_report_s += 10

        server.wait_until_ready(report)
    console.print(f"      ready after {time.monotonic() - started:.0f} s")


def _stream_answer(base_url: str) -> list[float]:
    """Print the answer as it comes; return the milliseconds between its tokens."""
    client = OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    arrivals = []
    with client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
    ) as stream:
        for chunk in stream:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                arrivals.append(time.perf_counter())
                print(text, end="", flush=True)
    print()
    return [
        1e3 * (later - sooner)
        for sooner, later in zip(arrivals, arrivals[1:], strict=False)
    ]


def _read_metrics(base_url: str) -> dict[str, float]:
    """Return each of METRICS, summed over its engines and nodes."""
    text = httpx.get(f"{base_url}/metrics", timeout=30).raise_for_status().text
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in METRICS:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    if missing := [name for name in METRICS if name not in totals]:
        raise ServerError(
            f"{base_url}/metrics lacks {', '.join(missing)}. A server that offloads "
            "attention exports them. Check in its log that the plugin was loaded."
        )
    return totals


def _print_summary(
    console: Console, gaps_ms: list[float], metrics: dict[str, float]
) -> None:
    blocks, worker_bytes, sent, received = (metrics[name] for name in METRICS)
    time_per_token = f"{statistics.median(gaps_ms):.1f} ms" if gaps_ms else "no tokens"
    for label, value in (
        ("KV blocks on the memory node", f"{blocks:,.0f}"),
        ("Bytes of KV on the compute worker", f"{worker_bytes:,.0f}"),
        ("Bytes sent to the memory node", f"{sent:,.0f}"),
        ("Bytes received from it", f"{received:,.0f}"),
        ("Time per output token (median)", time_per_token),
    ):
        console.print(f"      {label:<36}{value:>16}")


def _print_failure(console: Console, error: Exception, log: Path) -> None:
    console.print(f"\nThe demo failed: {error}", markup=False)
    if log.exists() and not isinstance(error, ProcessError):
        console.print(f"{log} ends:\n{log_tail(log)}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
