# SPDX-License-Identifier: Apache-2.0
"""The commands of `vllm-attn-offload`; only the one that is named is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vllm_attn_offload.errors import MemoryNodeError

_Add = Callable[[Any], None]
_Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str]) -> int:
    """Run a command; returns its exit status (2: bad input)."""
    parser = argparse.ArgumentParser(
        prog="vllm-attn-offload",
        description="Plan, look at and check attention offloading.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runs: dict[str, _Run] = {}
    for name, (text, load) in COMMANDS.items():
        if name in argv[:1]:
            add, runs[name] = load()
            add(commands)
        else:
            commands.add_parser(name, help=text)
    args = parser.parse_args(argv)
    try:
        return runs[args.command](args)
    except (ValueError, MemoryNodeError) as error:
        print(f"vllm-attn-offload {args.command}: error: {error}", file=sys.stderr)
        return 2


def _plan() -> tuple[_Add, _Run]:
    from vllm_attn_offload.planner.plan import add_plan, run_plan

    return add_plan, run_plan


def _calibrate() -> tuple[_Add, _Run]:
    from vllm_attn_offload.planner.calibrate.command import add_calibrate, run_calibrate

    return add_calibrate, run_calibrate


def _status() -> tuple[_Add, _Run]:
    from vllm_attn_offload.status.command import add_status, run_status

    return add_status, run_status


def _doctor() -> tuple[_Add, _Run]:
    from vllm_attn_offload.doctor.command import add_doctor, run_doctor

    return add_doctor, run_doctor


def _ray() -> tuple[_Add, _Run]:
    from vllm_attn_offload.ray_nodes.command import add_ray, run_ray

    return add_ray, run_ray


def _hooks() -> tuple[_Add, _Run]:
    from vllm_attn_offload.hooks.command import add_hooks, run_hooks

    return add_hooks, run_hooks


#: What ``--help`` says of each, without importing it, and what imports it.
COMMANDS: dict[str, tuple[str, Callable[[], tuple[_Add, _Run]]]] = {
    "plan": (
        "does offloading attention pay for this model, hardware and workload?",
        _plan,
    ),
    "calibrate": (
        "measure this machine and write a hardware TOML that plan uses",
        _calibrate,
    ),
    "status": ("show memory nodes, their sessions and what they do", _status),
    "doctor": (
        "find what would keep an engine or a memory node from serving",
        _doctor,
    ),
    "ray": ("start, end and list pools of memory nodes in the Ray cluster", _ray),
    "hooks": ("compare what is used of vLLM with what it was written for", _hooks),
}
