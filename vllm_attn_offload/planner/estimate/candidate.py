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
    """Equal engines before their batch is chosen; `usd_per_hour` pays all of them."""

    engine: EngineTimes
    workload: Workload
    usd_per_hour: float | None

    @property
    def _label(self) -> str:
        engine = self.engine
        compute = f"{engine.compute.count * engine.num_engines}x"
        compute += engine.compute.device.name
        return f"{compute} + {engine.offload.memory}" if engine.offload else compute

    def evaluate(self) -> Estimate:
        """The largest batch that capacity, the SLO and the user allow.

        Raises:
            DoesNotFitError: Not even one request per micro-batch does.
        """
        engine, load, replicas = self.engine, self.workload, self.engine.num_engines
        batch, batch_limit = self._choose_batch()
        parts, tbt_s = self._decode(batch), self._tbt(batch)
        decode, prefill_s = batch / tbt_s * replicas, 0.0
        if load.prefill == "local":
            busy_s = max(engine.prefill(load.prompt), engine.send_prompt(load.prompt))
            prefill_s = busy_s / load.output / replicas
        tokens_per_s = 1 / (1 / decode + prefill_s)
        nodes = engine.offload.memory.count if engine.offload else 0
        usd = self.usd_per_hour
        return Estimate(
            label=self._label,
            batch=batch * replicas,
            num_devices=engine.compute.count * replicas + nodes,
            replicas=replicas,
            num_micro_batches=engine.num_micro_batches,
            overhead_s=engine.overhead(batch),
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
        n = self.engine.num_micro_batches
        return self.engine.decode(batch / n, self.workload.context, n)

    def _tbt(self, batch: int) -> float:
        """Time between tokens in seconds."""
        step_s = cost.step_time(*self._decode(batch), self.engine.num_micro_batches)
        return step_s + self.engine.overhead(batch)

    def _choose_batch(self) -> tuple[int, str]:
        """The batch of one replica, and its limit."""
        shape, load = self.engine.shape, self.workload
        least, budget = self.engine.num_micro_batches, self.engine.kv_budget
        limit = cost.max_batch(shape, budget, load.context)
        batch_limit = "memory"
        if load.max_batch is not None and load.max_batch < limit:
            limit, batch_limit = load.max_batch, "max batch"
        if limit < least:
            raise DoesNotFitError(
                f"{self._label} cannot run {least} request(s) of {load.context:,.0f} "
                f"tokens at once: {max(budget, 0) / 1e9:.1f} GB are left for "
                f"KV, one request takes {shape.kv_bytes(load.context) / 1e9:.2f} GB, "
                f"and the {batch_limit} limit is {limit}. Use more memory, a shorter "
                "context, or --kv-dtype fp8."
            )
        if load.slo_tbt_s is None or self._tbt(limit) <= load.slo_tbt_s:
            return limit, batch_limit
        return self._largest_within(limit, load.slo_tbt_s), "SLO"

    def _largest_within(self, limit: int, slo_s: float) -> int:
        """Largest batch up to `limit` whose time between tokens is within the SLO."""
        least = self.engine.num_micro_batches
        low, high = least - 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self._tbt(middle) <= slo_s:
                low = middle
            else:
                high = middle - 1
        if low < least:
            raise DoesNotFitError(
                f"{self._label} takes {self._tbt(least) * 1e3:.1f} ms per token with "
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
