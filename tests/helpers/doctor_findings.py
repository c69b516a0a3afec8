# SPDX-License-Identifier: Apache-2.0
"""Findings of `vllm-attn-offload doctor`, as tests look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_attn_offload.doctor.finding import Finding

CONFIGS = Path(__file__).resolve().parents[1] / "planner" / "configs"
Look = Callable[..., list[Finding]]


def one(findings: Sequence[Finding], check: str, severity: str = "fail") -> Finding:
    """The only finding of a check that is as bad; all have three parts."""
    for each in findings:
        has_parts = [bool(part) for part in (each.allowed, each.do)]
        assert has_parts == [each.severity != "ok"] * 2, each
    found = [e for e in findings if (e.check, e.severity) == (check, severity)]
    assert len(found) == 1, findings
    return found[0]
