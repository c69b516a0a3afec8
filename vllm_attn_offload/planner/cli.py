# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload plan`, `... calibrate`, `... ray` and `... hooks`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.hooks.command import add_hooks, run_hooks
from vllm_attn_offload.planner.calibrate.command import add_calibrate, run_calibrate
from vllm_attn_offload.planner.plan import add_plan, run_plan
from vllm_attn_offload.ray_nodes.command import add_ray, run_ray

_RUN = {
    "plan": run_plan,
    "calibrate": run_calibrate,
    "ray": run_ray,
    "hooks": run_hooks,
}


def main(argv: Sequence[str]) -> int:
    """Run a command; returns its exit status (2: bad input)."""
    parser = argparse.ArgumentParser(prog="vllm-attn-offload", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_plan(commands)
    add_calibrate(commands)
    add_ray(commands)
    add_hooks(commands)
    args = parser.parse_args(argv)
    try:
        return _RUN[args.command](args)
    except (ValueError, MemoryNodeError) as error:
        print(f"vllm-attn-offload {args.command}: error: {error}", file=sys.stderr)
        return 2
