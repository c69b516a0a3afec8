# SPDX-License-Identifier: Apache-2.0
"""Times of one batch on both CPU attention kernels, and its line in the table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from decode_kernels.cpu_sides import Batch

HEADER = (
    "shape                batch x ctx  rows thr    read    ours    vLLM  ratio of read"
    "    ours us    vLLM us  err ours err vLLM"
)


@dataclass(frozen=True, slots=True)
class Result:
    """Medians of one batch; rates in GB/s of keys and values."""

    shape: str
    batch: int
    context: int
    rows: int
    num_threads: int
    read_gbps: float
    ours_gbps: float
    vllm_gbps: float
    ours_us: list[float]
    vllm_us: list[float]
    ours_error: float
    vllm_error: float

    @classmethod
    def of(
        cls,
        batch: Batch,
        num_threads: int,
        samples: dict[str, list[float]],
        errors: list[float],
    ) -> Result:
        """Summarise seconds per layer; the ``_us`` lists are p20, median and p80."""
        read, ours, vllm = (
            batch.kv_bytes / statistics.median(samples[name]) / 1e9
            for name in ("read", "ours", "vllm")
        )
        return cls(
            shape=batch.shape.name,
            batch=batch.batch,
            context=batch.context,
            rows=batch.rows,
            num_threads=num_threads,
            read_gbps=read,
            ours_gbps=ours,
            vllm_gbps=vllm,
            ours_us=[1e6 * x for x in percentiles(samples["ours"])],
            vllm_us=[1e6 * x for x in percentiles(samples["vllm"])],
            ours_error=errors[0],
            vllm_error=errors[1],
        )

    def line(self) -> str:
        """Its line in the table."""
        return (
            f"{self.shape:20} {self.batch:3} x {self.context:<6} {self.rows:4} "
            f"{self.num_threads:3} "
            f"{self.read_gbps:7.1f} {self.ours_gbps:7.1f} {self.vllm_gbps:7.1f} "
            f"{self.ours_gbps / self.vllm_gbps:6.2f}x "
            f"{100 * self.ours_gbps / self.read_gbps:5.0f}% "
            f"{self.ours_us[1]:10.1f} {self.vllm_us[1]:10.1f} "
            f"{self.ours_error:8.1e} {self.vllm_error:8.1e}"
        )


def percentiles(samples: list[float]) -> list[float]:
    """p20, median and p80."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return [deciles[1], deciles[4], deciles[7]]
