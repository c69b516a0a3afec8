# SPDX-License-Identifier: Apache-2.0
"""``LLM(attention_offload=True)`` in bf16; a file of its own runs beside the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from equality import assert_close_bf16

Generated = Callable[[str, str], dict[str, Any]]

pytestmark = pytest.mark.long


def test_llm_bfloat16_is_close(
    generated: Generated, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16 parts from stock only where rounding decides."""
    stock, offload = generated("bfloat16", "stock"), generated("bfloat16", "offload")
    report = assert_close_bf16(stock["greedy"], offload["greedy"])
    with capsys.disabled():
        print(f"\nLLM(), {report}")  # noqa: T201
