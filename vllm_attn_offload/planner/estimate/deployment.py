# SPDX-License-Identifier: Apache-2.0
"""Evaluate one deployment: with memory nodes, or homogeneous devices of one kind."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.engine_times import EngineTimes
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.model.shape import ModelShape

# What makes requests smaller, by the limit of their number.
_REMEDIES = {
    "memory": ", a shorter context, or --kv-dtype fp8",
    "states": " on the compute devices, or fewer bits per weight",
}


class DoesNotFitError(ValueError):
    """Weights, or the KV or states of one request, exceed the devices' memory."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Steady state at one batch size: `batch` requests over `replicas` engines.

    Times are of one micro-batch of one engine, in seconds; `overhead_s` is of a whole
    step. Without a price both USD fields are None.
    """

    label: str
    batch: int
    num_devices: int
    replicas: int
    num_micro_batches: int
    overhead_s: float
    model_s: float
    attention_s: float
    wire_s: float
    tbt_s: float
    decode_tokens_per_s: float
    prefill_share: float
    tokens_per_s: float
    usd_per_hour: float | None
    usd_per_mtoken: float | None
    batch_limit: str
    bottleneck: str

    @property
    def cost_per_token(self) -> float:
        """USD per hour and token/s, for ranking; devices where a price lacks."""
        paid = self.num_devices if self.usd_per_hour is None else self.usd_per_hour
        return paid / self.tokens_per_s


def evaluate_offload(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    usd_per_hour: float | None,
    num_micro_batches: int = 1,
) -> Estimate:
    """Best split of the compute devices into engines that share the memory nodes.

    Raises:
        DoesNotFitError: Weights exceed every split, or no request fits.
        ValueError: Impossible partition.
    """
    whole = EngineTimes(
        shape, offload.compute, offload, num_micro_batches=num_micro_batches
    )
    return _best_split(whole, workload, usd_per_hour)


def evaluate_homogeneous(
    shape: ModelShape,
    devices: DeviceCount,
    workload: Workload,
    usd_per_hour: float | None,
) -> Estimate:
    """Best split of one kind of device into equal tensor-parallel replicas.

    Raises:
        DoesNotFitError: No split holds the weights and one request.
    """
    return _best_split(EngineTimes(shape, devices), workload, usd_per_hour)


def _best_split(
    whole: EngineTimes, workload: Workload, usd_per_hour: float | None
) -> Estimate:
    """The fastest of all splits of the devices into equal tensor-parallel engines.

    What does not fit the largest engine fits no smaller one, so its reason is given.
    """
    found: list[Estimate] = []
    reason = DoesNotFitError("")
    count = whole.compute.count
    for tp in (t for t in range(1, count + 1) if count % t == 0):
        try:
            engine = whole.split(count // tp)
            _check_engine(engine)
            found.append(_Candidate(engine, workload, usd_per_hour).evaluate())
        except DoesNotFitError as error:
            reason = error
    if not found:
        raise reason
    return max(found, key=lambda estimate: estimate.tokens_per_s)


def _check_engine(engine: EngineTimes) -> None:
    """Devices and query heads must split evenly, and the weights must fit."""
    shape, n, tp = engine.shape, engine.num_micro_batches, engine.compute.count
    replicas = max(n - 1, 1)
    if tp % replicas:
        raise DoesNotFitError(
            f"{n} micro-batches rotate over {replicas} model replicas. {tp} compute "
            "devices do not split into these. Use fewer micro-batches."
        )
    if shape.states and n > 1:
        raise DoesNotFitError(
            f"{n} micro-batches were given for {shape.name}. Steps of a model with "
            "recurrent states run whole, in 1. Use 1."
        )
    devices = DeviceCount(engine.compute.device, tp // replicas)
    heads = [layer.num_heads for layer in shape.layers]
    if any(num_heads % devices.count for num_heads in heads):
        raise DoesNotFitError(
            f"{shape.name} cannot run tensor-parallel on {devices}: its {min(heads)} "
            f"query heads do not split evenly. The count must divide {min(heads)}. Use "
            "another number of devices."
        )
    usable = cost.memory_budget(devices.device, 1)
    if shape.weight_bytes >= usable * devices.count:
        raise DoesNotFitError(
            f"The {shape.weight_bytes / 1e9:.1f} GB of weights of {shape.name} do not "
            f"fit {devices} ({devices.count * usable / 1e9:.1f} GB usable). At least "
            f"{int(shape.weight_bytes // usable) + 1}x{devices.device.name} are "
            "needed. Use more or larger devices, or fewer bits per weight."
        )


@dataclass(frozen=True, slots=True)
class _Candidate:
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
        load, least = self.workload, self.engine.num_micro_batches
        capacity = self.engine.capacity(load.context)
        limit, batch_limit = int(capacity.num_requests), capacity.limit
        if load.max_batch is not None and load.max_batch < limit:
            limit, batch_limit = load.max_batch, "max batch"
        if limit < least:
            raise DoesNotFitError(
                f"{self._label} cannot run {least} request(s) of {load.context:,.0f} "
                f"tokens at once: {capacity}, and the {batch_limit} limit is {limit}. "
                f"Use more memory{_REMEDIES[capacity.limit]}."
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
