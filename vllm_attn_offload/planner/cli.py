# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload plan` and `vllm-attn-offload calibrate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.planner.calibrate.command import add_calibrate, run_calibrate
from vllm_attn_offload.planner.estimate.deployment import Offload, Workload
from vllm_attn_offload.planner.hardware import (
    Catalogue,
    Device,
    DeviceGroup,
    Price,
    load_catalogue,
    parse_group,
    parse_network,
)
from vllm_attn_offload.planner.model.config import ENGINE_DTYPES, read_model_shape
from vllm_attn_offload.planner.plan import Question, answer
from vllm_attn_offload.planner.simulate.failures import Failures, NodeLoss
from vllm_attn_offload.planner.simulate.traces import Request, read_trace, summarize

PLAN_HELP = "does offloading attention pay for this model, hardware and workload?"
PLAN_EPILOG = """examples:
  vllm-attn-offload plan meta-llama/Meta-Llama-3-8B --compute 1xH100 --memory 2xH20 \\
      --network 400Gbps --context 8192
  vllm-attn-offload plan ./Llama-3-70B --compute 2xH100 --memory 4xH20 \\
      --trace AzureLLMInferenceTrace_conv.csv --slo-tbt-ms 100 --simulate
  vllm-attn-offload plan ./Qwen3-8B --compute 1xL40S --memory 4xRTX3090 --search
"""


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed here. It must be a positive {kind.__name__}. "
                "Give a number above zero."
            )
        return value

    return parse


def _two_numbers(text: str) -> tuple[float, float]:
    first, _, second = text.partition(":")
    return _positive(float)(first), _positive(float)(second)


def _price(text: str) -> tuple[str, float]:
    name, _, usd = text.partition("=")
    return name, _positive(float)(usd)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help=PLAN_HELP,
        description=PLAN_HELP,
        epilog=PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = plan.add_argument
    add("model", help="config.json, model directory, or Hugging Face model id")
    hardware = plan.add_argument_group("hardware")
    add = hardware.add_argument
    add("--compute", required=True, help="compute devices of one engine, e.g. 1xH100")
    add("--memory", required=True, help="memory nodes, e.g. 2xH20")
    add("--network", default="400Gbps", help="one port per device (default: 400Gbps)")
    add(
        "--latency-us",
        type=_positive(float),
        help="round trip of one small exchange (default 66.6, Lamina's NCCL figure)",
    )
    add("--hardware", type=Path, action="append", default=[], help="extra TOML file")
    add("--price", type=_price, action="append", default=[], metavar="NAME=USD")
    add("--price-list", help="price list of the catalogue (default: a common one)")
    add("--ideal", action="store_true", help="datasheet rooflines, no efficiencies")
    _add_workload(plan)
    _add_output(plan)


def _add_output(plan: argparse.ArgumentParser) -> None:
    output = plan.add_argument_group("output")
    add = output.add_argument
    add("--search", action="store_true", help="rank ratios of these two devices")
    add("--simulate", action="store_true", help="replay --trace in the event simulator")
    add(
        "--straggler",
        type=_two_numbers,
        metavar="P:FACTOR",
        help="simulate: a node is slow by FACTOR in a share P of the steps",
    )
    add(
        "--node-loss",
        type=_two_numbers,
        metavar="AT:DOWN",
        action="append",
        default=[],
        help="simulate: a memory node dies AT seconds and is replaced after DOWN",
    )
    add("--plot", type=Path, metavar="PNG", help="throughput per dollar and roofline")
    add("--json", action="store_true", help="print JSON instead of tables")


def _add_workload(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument_group("workload").add_argument
    add("--context", type=_positive(int), help="mean cached tokens (default 8192)")
    add("--output-len", type=_positive(int), help="generated tokens (default 256)")
    add("--trace", type=Path, help="Azure CSV or Mooncake JSONL, instead of the above")
    add("--slo-tbt-ms", type=_positive(float), help="bound on time between tokens")
    add("--max-num-seqs", type=_positive(int), help="bound on the batch")
    add(
        "--prefill",
        choices=("local", "none"),
        default="local",
        help="none: prefill runs elsewhere, as in the paper's evaluation",
    )
    add("--micro-batches", type=_positive(int), default=2, help="up to N (default 2)")
    add("--partition", choices=("auto", "heads", "blocks"), default="auto")
    add("--dtype", choices=("auto", *ENGINE_DTYPES), default="auto")
    add("--kv-dtype", default="auto", help="auto (like --dtype) or fp8")
    add("--weight-bits", type=_positive(float), help="instead of the config's dtype")


def build_parser() -> argparse.ArgumentParser:
    """The parser of both subcommands."""
    parser = argparse.ArgumentParser(prog="vllm-attn-offload", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    add_calibrate(commands)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `plan` or `calibrate`; returns the exit status (2: bad input)."""
    args = build_parser().parse_args(argv)
    run = _plan if args.command == "plan" else run_calibrate
    try:
        return run(args)
    except (ValueError, MemoryNodeError) as error:
        print(f"vllm-attn-offload {args.command}: error: {error}", file=sys.stderr)
        return 2


def _priced(group: DeviceGroup, args: argparse.Namespace) -> DeviceGroup:
    device: Device = group.device.ideal() if args.ideal else group.device
    for name, usd in args.price:
        if name.lower() == device.name.lower():
            given = Price(usd, "given by --price", "")
            listed = {args.price_list or key: given for key in device.price}
            device = replace(device, price=listed or {"given": given})
    return replace(group, device=device)


def _check_price_names(args: argparse.Namespace, catalogue: Catalogue) -> None:
    for name, _ in args.price:
        catalogue.device(name)
    known = sorted({key for d in catalogue.devices.values() for key in d.price})
    if args.price_list is not None and args.price_list not in known:
        raise ValueError(
            f"Unknown price list {args.price_list!r}. Known: {', '.join(known)}. "
            "Use one of these, or leave --price-list out."
        )


def _plan(args: argparse.Namespace) -> int:
    catalogue = load_catalogue(args.hardware)
    _check_price_names(args, catalogue)
    network = parse_network(args.network, catalogue)
    if args.latency_us is not None:
        network = replace(network, latency_us=args.latency_us)
    if args.ideal:
        network = replace(network, efficiency=1.0)
    offload = Offload(
        compute=_priced(parse_group(args.compute, catalogue), args),
        memory=_priced(parse_group(args.memory, catalogue), args),
        network=network,
        partition=args.partition,
    )
    workload, requests = _workload(args)
    shape = read_model_shape(args.model, args.kv_dtype, args.weight_bits, args.dtype)
    question = Question(
        shape, offload, workload, requests, int(args.micro_batches), args.price_list
    )
    failures = _failures(args) if args.simulate else None
    text, document = answer(question, args.search, failures, args.plot)
    print(json.dumps(document, indent=2) if args.json else text)
    return 0


def _workload(args: argparse.Namespace) -> tuple[Workload, list[Request]]:
    requests: list[Request] = []
    if args.trace is not None:
        if args.context is not None or args.output_len is not None:
            raise ValueError(
                "--trace was given together with --context or --output-len. A trace "
                "brings its own lengths. Give one or the other."
            )
        requests = read_trace(args.trace)
        summary = summarize(requests)
        context, prompt, output = summary.context, summary.prompt, summary.output
    else:
        if args.simulate:
            raise ValueError(
                "--simulate was given without --trace. The simulator replays a trace. "
                "Add --trace FILE."
            )
        context, output = args.context or 8192, args.output_len or 256
        prompt = max(context - output / 2, 1)
    slo_s = args.slo_tbt_ms / 1e3 if args.slo_tbt_ms else None
    workload = Workload(context, prompt, output, args.prefill, slo_s, args.max_num_seqs)
    return workload, requests


def _failures(args: argparse.Namespace) -> Failures:
    share, factor = args.straggler or (0.0, 1.0)
    if share > 1 or factor < 1:
        raise ValueError(
            f"--straggler {share:g}:{factor:g} is not possible. The share of steps is "
            "at most 1 and the factor at least 1. For example 0.01:3."
        )
    losses = tuple(NodeLoss(at_s, down_s) for at_s, down_s in args.node_loss)
    return Failures(share, factor, losses)
