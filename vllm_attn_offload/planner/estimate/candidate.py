# SPDX-License-Identifier: Apache-2.0
"""Choice of a deployment's batch: the largest that memory and time allow."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.engine_times import EngineTimes
from vllm_attn_offload.planner.estimate.estimate import DoesNotFitError, Estimate
from vllm_attn_offload.planner.estimate.workload import Workload


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of `replicas` equal engines before its batch is chosen.

    Attributes:
        num_devices: Devices of all replicas.
        kv_budget: Bytes of KV of one replica.
        prefill_s: Seconds that the prefill of a request keeps one replica busy.
        usd_per_hour: Price of all replicas; None: unknown.
    """

    label: str
    num_devices: int
    times: EngineTimes
    workload: Workload
    kv_budget: float
    prefill_s: float
    usd_per_hour: float | None
    replicas: int

    def evaluate(self) -> Estimate:
        """The largest batch that capacity, the SLO and the user allow.

        Raises:
            DoesNotFitError: Not even one request per micro-batch does.
        """
        batch, batch_limit = self._choose_batch()
        parts, tbt_s = self._decode(batch), self._tbt(batch)
        decode = batch / tbt_s * self.replicas
        is_local = self.workload.prefill == "local"
        prefill_s = self.prefill_s / self.workload.output / self.replicas * is_local
        tokens_per_s = 1 / (1 / decode + prefill_s)
        usd = self.usd_per_hour
        return Estimate(
            label=self.label,
            batch=batch * self.replicas,
            num_devices=self.num_devices,
            replicas=self.replicas,
            num_micro_batches=self.times.num_micro_batches,
            overhead_s=self.times.overhead(batch),
            model_s=parts[0],
            attention_s=parts[1],
            wire_s=parts[2],
            tbt_s=tbt_s,
            decode_tokens_per_s=decode,
            prefill_share=prefill_s * tokens_per_s,
            tokens_per_s=tokens_per_s,
            usd_per_hour=usd,
            usd_per_mtoken=None
            if usd is None
            else cost.usd_per_mtoken(usd, tokens_per_s),
            batch_limit=batch_limit,
            bottleneck=_bottleneck(*parts, prefill_s * decode),
        )

    def _decode(self, batch: int) -> tuple[float, float, float]:
        n = self.times.num_micro_batches
        return self.times.decode(batch / n, self.workload.context, n)

    def _tbt(self, batch: int) -> float:
        """Time between tokens in seconds."""
        step_s = cost.step_time(*self._decode(batch), self.times.num_micro_batches)
        return step_s + self.times.overhead(batch)

    def _choose_batch(self) -> tuple[int, str]:
        """The batch of one replica, and its limit."""
        shape, load = self.times.shape, self.workload
        least = self.times.num_micro_batches
        limit = cost.max_batch(shape, self.kv_budget, load.context)
        batch_limit = "memory"
        if load.max_batch is not None and load.max_batch < limit:
            limit, batch_limit = load.max_batch, "max batch"
        if limit < least:
            raise DoesNotFitError(
                f"{self.label} cannot run {least} request(s) of {load.context:,.0f} "
                f"tokens at once: {max(self.kv_budget, 0) / 1e9:.1f} GB are left for "
                f"KV, one request takes {shape.kv_bytes(load.context) / 1e9:.2f} GB, "
                f"and the {batch_limit} limit is {limit}. Use more memory, a shorter "
                "context, or --kv-dtype fp8."
            )
        if load.slo_tbt_s is None or self._tbt(limit) <= load.slo_tbt_s:
            return limit, batch_limit
        return self._largest_within(limit, load.slo_tbt_s), "SLO"

    def _largest_within(self, limit: int, slo_s: float) -> int:
        """Largest batch up to `limit` whose time between tokens is within the SLO."""
        least = self.times.num_micro_batches
        low, high = least - 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self._tbt(middle) <= slo_s:
                low = middle
            else:
                high = middle - 1
        if low < least:
            raise DoesNotFitError(
                f"{self.label} takes {self._tbt(least) * 1e3:.1f} ms per token with "
                f"{least} request(s); the SLO is {slo_s * 1e3:.1f} ms. A smaller step "
                "needs faster or more devices, or a lower network latency. Relax "
                "--slo-tbt-ms or change the hardware."
            )
        return low


def _bottleneck(
    model_s: float, attention_s: float, wire_s: float, prefill_per_decode: float
) -> str:
    if prefill_per_decode > 1:
        return "prefill"
    parts = {"model": model_s, "attention": attention_s, "network": wire_s}
    return max(parts, key=lambda name: parts[name])
