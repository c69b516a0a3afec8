# SPDX-License-Identifier: Apache-2.0
"""The predicted steady state of a deployment."""

from __future__ import annotations

from dataclasses import dataclass


class DoesNotFitError(ValueError):
    """The weights, or the KV of one request, exceed the devices' memory."""


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
