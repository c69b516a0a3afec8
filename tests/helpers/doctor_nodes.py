# SPDX-License-Identifier: Apache-2.0
"""Memory nodes that `vllm-attn-offload doctor` looks at in tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from doctor_findings import CONFIGS
from node_process import NodeProcess

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.check import in_background
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.doctor.model_size import read_shape
from vllm_attn_offload.doctor.node_examination import NodeExamination

OPTIONS = ("--kv-cache-gib", "0.25", "--cpus", str(max(os.sched_getaffinity(0))))
MODEL = str(CONFIGS / "llama-3-8b")
StartNode = Callable[..., NodeProcess]


def case(address: str, model: str = "", **options: Any) -> Case:
    config = AttentionOffloadConfig(memory_nodes=(address,), **options)
    shape = in_background(lambda: read_shape(model, ())) if model else None
    return Case(config, model=model, shape=shape, timeout_s=1.0)


def look_at(address: str, model: str = "", **options: Any) -> list[Finding]:
    return list(NodeExamination(address, case(address, model, **options)).run())
