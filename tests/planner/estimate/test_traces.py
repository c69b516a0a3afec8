# SPDX-License-Identifier: Apache-2.0
"""Both public trace formats, and the decode-weighted mean context."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_attn_offload.planner.estimate.traces import Request, read_trace, summarize

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,0
"""
MOONCAKE = """{"timestamp": 0, "input_length": 100, "output_length": 2, "hash_ids": [0]}
{"timestamp": 1500, "input_length": 10, "output_length": 1, "hash_ids": [1]}
"""


def test_read_trace_azure(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    first, second = read_trace(path)
    assert first == Request(0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-5)


def test_read_trace_mooncake(tmp_path: Path) -> None:
    path = tmp_path / "kimi.jsonl"
    path.write_text(MOONCAKE)
    requests = read_trace(path)
    assert requests == [Request(0.0, 100, 2), Request(1.5, 10, 1)]
    # Decode steps see 100, 101 and 10 cached tokens.
    summary = summarize(requests)
    assert summary.context == pytest.approx((100 + 101 + 10) / 3)
    assert (summary.prompt, summary.output, summary.num_requests) == (55, 1.5, 2)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", '{"timestamp": 0}\n', AZURE[:40]])
def test_read_trace_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"Cannot read trace|no request"):
        read_trace(path)
