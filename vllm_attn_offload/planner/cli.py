# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload plan` and `vllm-attn-offload calibrate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.planner.calibrate.command import add_calibrate, run_calibrate
from vllm_attn_offload.planner.plan import add_plan, run_plan


def main(argv: Sequence[str]) -> int:
    """Run `plan` or `calibrate`; returns the exit status (2: bad input)."""
    parser = argparse.ArgumentParser(prog="vllm-attn-offload", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_plan(commands)
    add_calibrate(commands)
    args = parser.parse_args(argv)
    run = run_plan if args.command == "plan" else run_calibrate
    try:
        return run(args)
    except (ValueError, MemoryNodeError) as error:
        print(f"vllm-attn-offload {args.command}: error: {error}", file=sys.stderr)
        return 2
