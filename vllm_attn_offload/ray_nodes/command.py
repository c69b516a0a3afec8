# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload ray`: shared pools of memory nodes in a Ray cluster."""

from __future__ import annotations

import argparse
import json

from vllm_attn_offload.ray_nodes.cluster import check_installed
from vllm_attn_offload.ray_nodes.node_actor import NodeState
from vllm_attn_offload.ray_nodes.node_order import NodeOrder, new_token
from vllm_attn_offload.ray_nodes.shared_pool import SharedPool
from vllm_attn_offload.ray_options import POOL_NAME
from vllm_attn_offload.transport.trust import Credentials

RAY_HELP = "start, end and list pools of memory nodes in the Ray cluster"
_EPILOG = """examples:
  vllm-attn-offload ray up shared --num 2 --kv-cache-gib 64
  vllm serve MODEL --attention-offload \\
      --attention-offload-config.memory_nodes ray:shared \\
      --attention-offload-config.kv_cache_gib 16
  vllm-attn-offload ray list
  vllm-attn-offload ray down shared
Each engine takes its kv_cache_gib of every node; without it, all that is free. The
cluster is that of RAY_ADDRESS, or of this host."""


def add_ray(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "ray",
        help=RAY_HELP,
        description=RAY_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up", help="place the nodes of a pool and wait for them")
    up.add_argument("name", metavar="NAME", help="of the pool, for memory_nodes")
    up.add_argument("--num", type=int, default=1, help="of nodes (default 1)")
    up.add_argument("--kv-cache-gib", type=float, required=True, help="of each node")
    up.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    up.add_argument(
        "--resources",
        type=_amounts,
        metavar="JSON",
        help="what each node asks Ray for; CPU, GPU and memory (bytes) are Ray's own "
        '(default {"memory_node": 1})',
    )
    up.add_argument(
        "--auth-token-file",
        default="",
        metavar="PATH",
        help="file with the token of the pool (default: a new one, which engines get "
        "from Ray)",
    )
    up.add_argument("--startup-timeout-s", type=float, default=60.0, metavar="S")
    down = actions.add_parser("down", help="end the nodes of a pool")
    down.add_argument("name", metavar="NAME")
    actions.add_parser("list", help="show all pools and their nodes")


def run_ray(args: argparse.Namespace) -> int:
    """Run an action; returns the exit status, 1 where a listed node does not run.

    Raises:
        ValueError: A bad option, no Ray, no cluster, or no such pool.
        MemoryNodeError: A node has no place or does not start.
    """
    try:
        check_installed()
    except ImportError as error:
        raise ValueError(str(error)) from error
    if args.action == "up":
        _up(args)
    elif args.action == "down":
        num_nodes = SharedPool(args.name).down()
        print(f"Ended {num_nodes} memory node(s) of {args.name}.")
    else:
        return _list()
    return 0


def _up(args: argparse.Namespace) -> None:
    order = _checked_order(args)
    states = SharedPool(args.name).up(args.num, order)
    for state in states:
        print(_line(args.name, state))
    print(
        f"Use it with: --attention-offload-config.memory_nodes ray:{args.name} "
        "--attention-offload-config.kv_cache_gib G, an engine's share of each node"
    )


def _checked_order(args: argparse.Namespace) -> NodeOrder:
    if not POOL_NAME.fullmatch(args.name):
        raise ValueError(
            f"{args.name!r} was given as the name of a pool. Allowed: a letter, then "
            "up to 63 letters, digits, '_', '.' and '-'. Write for example shared."
        )
    if not 1 <= args.num <= 64:
        raise ValueError(
            f"--num {args.num} was given. Allowed: 1 to 64. Write for example --num 2."
        )
    for name in ("kv_cache_gib", "startup_timeout_s"):
        if not 0 < getattr(args, name) < float("inf"):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} {getattr(args, name):g} was given. Allowed: a number above "
                f"0. Write for example {option} 60."
            )
    token = Credentials(args.auth_token_file).read_token()
    return NodeOrder(
        kv_cache_gib=args.kv_cache_gib,
        device=args.device,
        resources=args.resources,
        auth_token=token or new_token(),
        startup_timeout_s=args.startup_timeout_s,
    )


def _amounts(text: str) -> dict[str, float]:
    problem = "not an object of amounts"
    try:
        resources = json.loads(text)
    except json.JSONDecodeError as error:
        resources, problem = None, f"not JSON, {error}"
    if not _are_amounts(resources):
        raise argparse.ArgumentTypeError(
            f"{text!r} was given ({problem}). Allowed: a JSON object of amounts above "
            """0 by resource. Write for example '{"memory_node": 1}'."""
        )
    amounts: dict[str, float] = resources
    return amounts


def _are_amounts(resources: object) -> bool:
    if not isinstance(resources, dict) or not resources:
        return False
    return all(
        isinstance(amount, int | float) and not isinstance(amount, bool) and amount > 0
        for amount in resources.values()
    )


def _list() -> int:
    names = sorted(SharedPool.sizes())
    if not names:
        print("There are no pools. Make one with: vllm-attn-offload ray up NAME")
    is_well = True
    for name in names:
        for state in SharedPool(name).states():
            is_well = is_well and not state.problem
            print(_line(name, state))
    return 0 if is_well else 1


def _line(name: str, state: NodeState) -> str:
    if state.problem:
        return f"{name}  {state.host_id[:8] or '-'}  {state.problem}"
    return f"{name}  {state.host_id[:8]}  {state.address}  pid {state.pid}"
