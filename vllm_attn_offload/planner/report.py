# SPDX-License-Identifier: Apache-2.0
"""A comparison as tables and sentences, or as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from vllm_attn_offload.planner.estimate.compare import ALPHA, Comparison, Ratio
from vllm_attn_offload.planner.estimate.deployment import Estimate
from vllm_attn_offload.planner.model.shape import ModelShape

WIDTH = 88
MAX_RATIOS = 15
ROWS: tuple[tuple[str, Callable[[Estimate], str]], ...] = (
    ("Engines", lambda e: f"{e.replicas}"),
    ("Micro-batches", lambda e: f"{e.num_micro_batches}"),
    ("Batch (limited by)", lambda e: f"{e.batch:,} ({e.batch_limit})"),
    ("Time between tokens, ms", lambda e: f"{e.tbt_s * 1e3:.1f}"),
    ("  model, per micro-batch", lambda e: f"{e.model_s * 1e3:.1f}"),
    ("  attention", lambda e: f"{e.attention_s * 1e3:.1f}"),
    ("  network", lambda e: f"{e.wire_s * 1e3:.1f}"),
    ("  output head, scheduling", lambda e: f"{e.overhead_s * 1e3:.1f}"),
    ("Prefill, share of time", lambda e: f"{e.prefill_share:.0%}"),
    ("Tokens/s", lambda e: f"{e.tokens_per_s:,.0f}"),
    ("  decode only", lambda e: f"{e.decode_tokens_per_s:,.0f}"),
    ("USD/hour", lambda e: format_usd(e.usd_per_hour)),
    ("USD/Mtoken", lambda e: format_usd(e.usd_per_mtoken)),
    ("Bottleneck", lambda e: e.bottleneck),
)


def format_usd(usd: float | None) -> str:
    """USD with cents, or "no price" for None."""
    return "no price" if usd is None else f"{usd:.2f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others, a rule under the header."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, rows)])


def _wrap(title: str, text: str) -> str:
    return textwrap.fill(f"{title}: {text}", WIDTH, subsequent_indent="  ")


def format_comparison(result: Comparison) -> str:
    """The table and sentences that `plan` prints."""
    shape, load = result.question.shape, result.question.workload
    lines = [
        f"{shape.name}: {shape.num_params / 1e9:.1f}B parameters, "
        f"{shape.weight_bytes / 1e9:.1f} GB of weights, "
        f"{shape.kv_bytes(load.context) / load.context:,.0f} B of KV per token"
        + _state_words(shape),
        f"Workload: {load.context:,.0f} tokens of context on average "
        f"({load.prompt:,.0f} prompt, {load.output:,.0f} generated), prefill "
        + ("on the compute devices" if load.prefill == "local" else "elsewhere"),
        "",
    ]
    estimates = [*result.offloaded, *result.alternatives]
    if estimates:
        header = ["", *(e.label for e in estimates)]
        lines += [
            format_table(
                header, [[name, *map(show, estimates)] for name, show in ROWS]
            ),
            "",
        ]
    lines += [_wrap("Does not fit", text) for text in result.refused]
    best = result.best_offload
    if best is not None and result.min_network_gbps is not None:
        lines.append(_wrap("Bottleneck", _bottleneck_words(result, best)))
        lines.append(_wrap("Minimum network", _network_words(result)))
    lines += [_wrap("Note", note) for note in result.notes]
    lines.append(_wrap("Verdict", result.verdict))
    return "\n".join(lines)


def _state_words(shape: ModelShape) -> str:
    if shape.states is None:
        return ""
    return f", {shape.state_bytes / 1e6:,.1f} MB in a recurrent state"


def _bottleneck_words(result: Comparison, best: Estimate) -> str:
    offload = result.question.offload
    compute, memory = offload.compute, offload.memory
    words = {
        "model": f"the non-attention part on {compute}; more memory nodes do not help",
        "attention": f"attention on {memory}; more memory nodes shorten the step",
        "network": "the exchange between compute and memory nodes; a faster network or "
        "lower latency shortens the step",
        "prefill": f"prefill on {compute}; decode only gets the rest of their time",
    }[best.bottleneck]
    limit = {
        "memory": f"the batch is limited by the KV memory of {memory}",
        "states": f"the batch is limited by the recurrent states on {compute}",
        "SLO": "the batch is limited by the time between tokens",
        "max batch": "the batch is limited by --max-num-seqs",
    }[best.batch_limit]
    return f"{words}; {limit}."


def _network_words(result: Comparison) -> str:
    network, need = result.question.offload.network, result.min_network_gbps
    assert need is not None
    num_layers = result.question.shape.num_layers
    latency_ms = num_layers * network.latency_us / 1e3
    enough = "enough" if network.gbps >= need else "too slow"
    return (
        f"{need:.1f} Gbps per port keep the wire within {ALPHA:.0%} of compute and "
        f"attention; {network.gbps:g} Gbps is {enough}. Latency adds "
        f"{latency_ms:.1f} ms per token ({num_layers} layers x "
        f"{network.latency_us:g} us)."
    )


def format_ratios(ratios: Sequence[Ratio]) -> str:
    """The cheapest ratios of `plan --search` as a table."""
    header = ["Ratio", "Engines", "Micro-batches", "Batch", "TBT ms", "Tokens/s"]
    header += ["USD/h", "USD/Mtok"]
    body = [
        [e.label, str(e.replicas), str(e.num_micro_batches), f"{e.batch:,}"]
        + [f"{e.tbt_s * 1e3:.1f}", f"{e.tokens_per_s:,.0f}"]
        + [format_usd(e.usd_per_hour), format_usd(e.usd_per_mtoken)]
        for _, _, e in ratios[:MAX_RATIOS]
    ]
    title = f"Ratios, cheapest token first ({len(body)} of {len(ratios)})"
    return f"{title}\n{format_table(header, body)}"


def comparison_json(result: Comparison) -> dict[str, Any]:
    """The same facts as plain JSON types; times in seconds."""
    return {
        "model": result.question.shape.name,
        "kv_bytes_per_token": result.question.shape.kv_bytes_per_token,
        "state_bytes": result.question.shape.state_bytes,
        "workload": asdict(result.question.workload),
        "offloaded": [asdict(e) for e in result.offloaded],
        "alternatives": [asdict(e) for e in result.alternatives],
        "does_not_fit": list(result.refused),
        "min_network_gbps": result.min_network_gbps,
        "price_list": result.price_list,
        "verdict": result.verdict,
        "notes": list(result.notes),
    }
