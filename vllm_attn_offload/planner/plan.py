# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload plan`: its options, and its answer as text or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from vllm_attn_offload.planner.estimate.compare import compare, search_ratios
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.question import Question
from vllm_attn_offload.planner.estimate.traces import read_trace, summarize
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.catalogue import (
    Catalogue,
    load_catalogue,
    parse_devices,
    parse_network,
)
from vllm_attn_offload.planner.hardware.device import Price
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.config import ENGINE_DTYPES, read_model_shape
from vllm_attn_offload.planner.plot import plot_plan
from vllm_attn_offload.planner.report import (
    comparison_json,
    format_comparison,
    format_ratios,
)

PLAN_HELP = "does offloading attention pay for this model, hardware and workload?"
PLAN_EPILOG = """examples:
  vllm-attn-offload plan meta-llama/Meta-Llama-3-8B --compute 1xH100 --memory 2xH20 \\
      --network 400Gbps --context 8192
  vllm-attn-offload plan ./Llama-3-70B --compute 2xH100 --memory 4xH20 \\
      --trace AzureLLMInferenceTrace_conv.csv --slo-tbt-ms 100
  vllm-attn-offload plan ./Qwen3-8B --compute 1xL40S --memory 4xRTX3090 --search
"""


def positive(kind: type) -> Callable[[str], float]:
    """Option type: a number of `kind` (int or float) above zero."""

    whole = " whole" if kind is int else ""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed here. It must be a{whole} number above zero. "
                "Give another one."
            )
        return value

    return parse


def _price(text: str) -> tuple[str, float]:
    name, _, usd = text.partition("=")
    return name, positive(float)(usd)


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    plan = commands.add_parser(
        "plan",
        help=PLAN_HELP,
        description=PLAN_HELP,
        epilog=PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_question(plan)
    add = plan.add_argument_group("output").add_argument
    add("--search", action="store_true", help="rank ratios of these two devices")
    add("--plot", type=Path, metavar="PNG", help="throughput per dollar and roofline")
    add("--json", action="store_true", help="print JSON instead of tables")


def add_question(parser: argparse.ArgumentParser) -> None:
    """Options of the model, the hardware and the workload."""
    parser.add_argument("model", help="config.json, model directory, or hub model id")
    add = parser.add_argument_group("hardware").add_argument
    add("--compute", required=True, help="compute devices of one engine, e.g. 1xH100")
    add("--memory", required=True, help="memory nodes, e.g. 2xH20")
    add("--network", default="400Gbps", help="one port per device (default: 400Gbps)")
    add(
        "--latency-us",
        type=positive(float),
        help="round trip of one small exchange (default 66.6, Lamina's NCCL figure)",
    )
    add("--hardware", type=Path, action="append", default=[], help="extra TOML file")
    add("--price", type=_price, action="append", default=[], metavar="NAME=USD")
    add("--price-list", help="price list of the catalogue (default: a common one)")
    add("--ideal", action="store_true", help="datasheet rooflines, no efficiencies")
    _add_workload(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("workload").add_argument
    add("--context", type=positive(int), help="mean cached tokens (default 8192)")
    add("--output-len", type=positive(int), help="generated tokens (default 256)")
    add("--trace", type=Path, help="Azure CSV or Mooncake JSONL, instead of the above")
    add("--slo-tbt-ms", type=positive(float), help="bound on time between tokens")
    add("--max-num-seqs", type=positive(int), help="bound on the batch")
    add(
        "--prefill",
        choices=("local", "none"),
        default="local",
        help="none: prefill runs elsewhere, as in the paper's evaluation",
    )
    add("--micro-batches", type=positive(int), default=2, help="up to N (default 2)")
    add("--partition", choices=("auto", "heads", "blocks"), default="auto")
    add("--dtype", choices=("auto", *ENGINE_DTYPES), default="auto")
    add(
        *("--kv-dtype", "--kv-cache-dtype"),
        default="auto",
        help="as the engine has it: auto (fp8 where the checkpoint's config.json asks "
        "for it, else like --dtype), or fp8; q, k, v and output travel in --dtype; "
        "the time of attention with fp8 is extrapolated from bytes",
    )
    add("--weight-bits", type=positive(float), help="instead of the config's dtype")


def run_plan(args: argparse.Namespace) -> int:
    """Compare, and optionally search and plot; returns the exit status.

    Raises:
        ValueError: Bad options, or a file that cannot be read or written.
    """
    question = read_question(args)
    result = compare(question)
    parts, document = [format_comparison(result)], comparison_json(result)
    if args.search or args.plot is not None:
        ratios = search_ratios(question)
        if args.plot is not None:
            plot_plan(question, ratios, args.plot)
            parts.append(f"Plot: {args.plot}")
        if args.search:
            parts.append(format_ratios(ratios))
            document["search"] = [asdict(estimate) for _, _, estimate in ratios]
    print(json.dumps(document, indent=2) if args.json else "\n\n".join(parts))
    return 0


def read_question(args: argparse.Namespace) -> Question:
    """The question that the options of `add_question` ask.

    Raises:
        ValueError: Bad options, or a file that cannot be read.
    """
    catalogue = load_catalogue(args.hardware)
    _check_price_names(args, catalogue)
    offload = Offload(
        compute=_devices(args.compute, catalogue, args),
        memory=_devices(args.memory, catalogue, args),
        network=_network(catalogue, args),
        partition=args.partition,
    )
    workload = _workload(args)
    shape = read_model_shape(args.model, args.kv_dtype, args.weight_bits, args.dtype)
    return Question(shape, offload, workload, args.micro_batches, args.price_list)


def _check_price_names(args: argparse.Namespace, catalogue: Catalogue) -> None:
    for name, _ in args.price:
        catalogue.device(name)
    known = sorted({key for d in catalogue.devices.values() for key in d.price})
    if args.price_list is not None and args.price_list not in known:
        raise ValueError(
            f"Unknown price list {args.price_list!r}. Known: {', '.join(known)}. "
            "Use one of these, or leave --price-list out."
        )


def _devices(text: str, catalogue: Catalogue, args: argparse.Namespace) -> DeviceCount:
    devices = parse_devices(text, catalogue)
    device = devices.device.ideal() if args.ideal else devices.device
    for name, usd in args.price:
        if name.lower() == device.name.lower():
            given = Price(usd, "given by --price", "")
            listed = {args.price_list or key: given for key in device.price}
            device = replace(device, price=listed or {"given": given})
    return replace(devices, device=device)


def _network(catalogue: Catalogue, args: argparse.Namespace) -> Network:
    network = parse_network(args.network, catalogue)
    if args.latency_us is not None:
        network = replace(network, latency_us=args.latency_us)
    return replace(network, efficiency=1.0) if args.ideal else network


def _workload(args: argparse.Namespace) -> Workload:
    if args.trace is not None:
        if args.context is not None or args.output_len is not None:
            raise ValueError(
                "--trace was given together with --context or --output-len. A trace "
                "brings its own lengths. Give one or the other."
            )
        summary = summarize(read_trace(args.trace))
        context, prompt, output = summary.context, summary.prompt, summary.output
    else:
        context, output = args.context or 8192, args.output_len or 256
        prompt = max(context - output / 2, 1)
    slo_s = args.slo_tbt_ms / 1e3 if args.slo_tbt_ms else None
    return Workload(context, prompt, output, args.prefill, slo_s, args.max_num_seqs)
