# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload calibrate`: its options and its start."""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_attn_offload.memory_node.extras import install_command, missing_modules
from vllm_attn_offload.planner.model.config import ENGINE_DTYPES, read_model_shape
from vllm_attn_offload.trust_options import add_trust_options, given_files

if TYPE_CHECKING:
    from vllm_attn_offload.planner.calibrate.calibration import Calibration

CALIBRATE_HELP = "measure this machine and write a hardware TOML that plan uses"
CALIBRATE_EPILOG = """examples:
  vllm-attn-offload calibrate --model Qwen/Qwen3-0.6B
  vllm-attn-offload calibrate --memory-node 10.0.0.7:7600 --name box --model ./Qwen3-8B
Then plan with it, without editing the file:
  vllm-attn-offload plan MODEL --hardware hardware.toml --compute 1xbox \\
      --memory 1xbox-node --network box
"""


def add_calibrate(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    """Add the subcommand."""
    calibrate = commands.add_parser(
        "calibrate",
        help=CALIBRATE_HELP,
        description=CALIBRATE_HELP,
        epilog=CALIBRATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = calibrate.add_argument
    add("--output", type=Path, default=Path("hardware.toml"), help="file to write")
    add("--name", default="local", help="device name to use with plan --compute")
    add("--device", default="cpu", help="torch device: cpu or cuda:N (default cpu)")
    add("--dtype", choices=ENGINE_DTYPES, default="bfloat16")
    add(
        "--memory-node",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a running memory node, may be repeated; none: start one here",
    )
    add("--model", help="measure in this model's sizes, and time vLLM with it")
    add("--no-engine", action="store_true", help="with --model: do not start vLLM")
    add("--cpus", type=_cpus, metavar="LIST", help="of the compute side, such as 0-7")
    add("--node-cpus", type=_cpus, metavar="LIST", help="of a memory node started here")
    add("--quick", action="store_true", help="fewer repetitions and points")
    add_trust_options(calibrate)


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure, write the file, and print the next command; returns 0.

    Raises:
        ValueError: Bad options, no torch, or vLLM does not serve the model here.
        MemoryNodeError: A memory node cannot be used.
    """
    if missing := missing_modules("torch"):
        raise ValueError(
            f"calibrate was asked for, and there is no {missing} here, with which it "
            "measures. Allowed without: plan, also with a hardware TOML of another "
            f"host. Run: {install_command('torch')}"
        )
    # torch takes seconds to import, and plan does without it.
    from vllm_attn_offload.planner.calibrate.calibration import check_output

    check_output(args.output)
    if args.memory_node and args.node_cpus:
        raise ValueError(
            "--node-cpus was given with --memory-node. It binds a memory node that is "
            "started here. Leave it out, or start that node with its own --cpus."
        )
    with ExitStack() as stack:
        cpus, node_cpus = _share_cpus(args)
        addresses = args.memory_node or [_start_node(stack, _text(node_cpus))]
        allowed = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, allowed)
        os.sched_setaffinity(0, cpus or allowed)
        print(_calibration(args, addresses, cpus).run())
    print(
        f"Wrote {args.output}. Next: vllm-attn-offload plan MODEL --hardware "
        f"{args.output} --compute 1x{args.name} --memory {len(addresses)}x"
        f"{args.name}-node --network {args.name}"
    )
    return 0


def _calibration(
    args: argparse.Namespace, addresses: list[str], cpus: frozenset[int]
) -> Calibration:
    from vllm_attn_offload.planner.calibrate.calibration import Calibration

    return Calibration(
        name=args.name,
        output=args.output,
        device=args.device,
        dtype=args.dtype,
        addresses=tuple(addresses),
        shape=read_model_shape(args.model, dtype=args.dtype) if args.model else None,
        engine_model=None if args.no_engine else args.model,
        cpus=_text(cpus),
        trust=given_files(args),
        is_quick=args.quick,
    )


def _cpus(text: str) -> frozenset[int]:
    # Late: it comes with the memory node's imports, which plan does without.
    from vllm_attn_offload.memory_node.args import cpu_list

    return cpu_list(text)


def _text(cpus: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


def _share_cpus(args: argparse.Namespace) -> tuple[frozenset[int], frozenset[int]]:
    """CPUs of the compute side and of a node here: halves, as where both work at once.

    An engine's default, whole steps on all cores in turns, is measured with ``--cpus``
    and ``--node-cpus`` that name all of them. Empty: all that are allowed.
    """
    none: frozenset[int] = frozenset()
    allowed = sorted(os.sched_getaffinity(0))
    if args.memory_node or args.device != "cpu" or len(allowed) == 1:
        return args.cpus or none, args.node_cpus or none
    half = frozenset(allowed[: len(allowed) - len(allowed) // 2])
    ours = args.cpus or half - (args.node_cpus or none) or half
    theirs = args.node_cpus or frozenset(allowed) - ours
    return ours, theirs


def _start_node(stack: ExitStack, cpus: str) -> str:
    from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess

    folder = Path(tempfile.mkdtemp(prefix="calibrate-"))
    node = MemoryNodeProcess(
        folder, kv_cache_gib=None, cpus=cpus, startup_timeout_s=60.0
    )
    stack.callback(node.stop)
    return node.address
