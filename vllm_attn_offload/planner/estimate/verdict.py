# SPDX-License-Identifier: Apache-2.0
"""The answer of a comparison in words."""

from __future__ import annotations

from vllm_attn_offload.planner.estimate.deployment import Estimate
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.question import Question

# Smaller differences are within the model's error.
MARGIN = 0.05


def verdict(
    offload: Offload, best: Estimate | None, rival: Estimate | None, refused: list[str]
) -> str:
    """The advice: offload or not, by how much, and why not."""
    if best is None:
        return f"Do not offload, because it does not fit. {refused[0]}"
    if rival is None:
        return f"Offload: no homogeneous alternative holds the model. {refused[-1]}"
    gain = rival.cost_per_token / best.cost_per_token - 1
    unit = "device" if best.usd_per_hour is None else "dollar"
    limited = ", limited by recurrent states," if best.batch_limit == "states" else ""
    batches = f"batch {best.batch:,}{limited} against {rival.batch:,}"
    if gain >= MARGIN:
        more = f"{gain:.0%} more tokens per {unit}"
        return f"Offload: {more} than {rival.label} ({batches})."
    if gain > -MARGIN:
        return (
            f"No clear gain: {gain:+.0%} tokens per {unit} against {rival.label} "
            f"({batches}), within the model's error. Prefer the simpler deployment."
        )
    reason = _reason(offload, best, rival)
    return (
        f"Do not offload, because {reason}: {-gain:.0%} fewer tokens per {unit} than "
        f"{rival.label} ({batches})."
    )


def _reason(offload: Offload, best: Estimate, rival: Estimate) -> str:
    model_s = best.model_s + best.overhead_s
    work = model_s + best.attention_s + best.wire_s
    if rival.label.endswith(offload.memory.device.name):
        return (
            f"{offload.memory.device.name} alone is cheaper: the same devices can also "
            "run the rest of the model"
        )
    if best.bottleneck == "prefill":
        return (
            f"prefill takes {best.prefill_share:.0%} of the compute devices' time "
            f"(homogeneous: {rival.prefill_share:.0%}, on more of them)"
        )
    if best.wire_s > max(best.attention_s, 0.3 * work):
        return (
            f"the network takes {best.wire_s / work:.0%} of a step "
            f"({offload.network.gbps:g} Gbps, {offload.network.latency_us:g} us)"
        )
    if best.batch_limit == "states":
        return f"the recurrent states of {best.batch:,} requests fill {offload.compute}"
    if best.bottleneck == "attention":
        return f"{offload.memory} read the KV cache too slowly for their price"
    return (
        f"the model itself takes {model_s / work:.0%} of a step, and the memory "
        "nodes' share of the budget would have bought compute devices"
    )


def notes(question: Question, prices: str | None) -> tuple[str, ...]:
    """Missing prices, prices of different lists, assumed figures, steps kept whole."""
    offload, found = question.offload, []
    if question.shape.states and question.num_micro_batches > 1:
        found.append(
            f"Steps of {question.shape.name} run whole, in 1 micro-batch, as it keeps "
            "recurrent states."
        )
    devices = [offload.compute.device, offload.memory.device]
    unpriced = list(dict.fromkeys(d.name for d in devices if not d.price))
    if unpriced:
        found.append(
            f"No price for {', '.join(unpriced)}: every device counts the same. Pass "
            + " ".join(f"--price {name}=USD_PER_HOUR" for name in unpriced)
            + " to compare cost."
        )
    elif prices is None:
        sources = "; ".join(
            f"{d.name}: {next(iter(d.price.values())).source}" for d in devices
        )
        found.append(
            f"Prices come from different lists, compare with care ({sources})."
        )
    for device in {d.name: d for d in devices}.values():
        origins = [("figures", device.source)]
        if device.price:
            used = device.price.get(prices or "") or next(iter(device.price.values()))
            origins.append(("price", used.source))
        found += [
            f"{device.name} {figure}: {source}."
            for figure, source in origins
            if "assumption" in source
        ]
    return tuple(found)
