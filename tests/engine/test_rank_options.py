# SPDX-License-Identifier: Apache-2.0
"""Hosts of one engine that were started with other options, or are gone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vllm_attn_offload.client.attachment import Attachment
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.rank_calls import RankCalls
from vllm_attn_offload.engine.rank_options import check_rank_options
from vllm_attn_offload.errors import RankSilentError

NODE = "10.0.0.7:7600"
LEADER = AttentionOffloadConfig((NODE,), auth_token_file="/here/token")
#: Deadlines of start and of answers.
SECONDS = {"startup_timeout_s": 7.0, "request_timeout_s": 3.0}


def test_the_same_options() -> None:
    """Files are a host's own."""
    theirs = AttentionOffloadConfig((NODE,), auth_token_file="/there/token")
    check_rank_options(
        LEADER.without_files(), [LEADER.without_files(), theirs.without_files()]
    )
    assert "token" not in str(LEADER.without_files())


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"on_node_loss": "fail"}, 'on_node_loss="fail", and the first host with on_n'),
        ({"num_microbatches": 2}, "num_microbatches=2, and the first host with num_mi"),
        ({"memory_nodes": ("a:1",)}, 'memory_nodes=["a:1"], and the first host with m'),
    ],
    ids=["on_node_loss", "num_microbatches", "memory_nodes"],
)
def test_other_options(options: dict[str, Any], given: str) -> None:
    """Rank, option and both values."""
    theirs = AttentionOffloadConfig(**{"memory_nodes": (NODE,), **options})
    message = re.escape(f"Rank 1 was started with {given}") + ".*Start every host with"
    with pytest.raises(ValueError, match=message):
        check_rank_options(
            LEADER.without_files(), [LEADER.without_files(), theirs.without_files()]
        )


def test_an_option_of_another_release() -> None:
    options = LEADER.without_files()
    with pytest.raises(ValueError, match="Rank 0 was started with new=1, and the firs"):
        check_rank_options(options, [options | {"new": 1}])


def test_silent_ranks() -> None:
    """How long they are waited for, at start and in a recovery."""
    waited: list[float] = []

    def silent(method: str, *, timeout: float, args: tuple[Any, ...]) -> list[Any]:
        waited.append(timeout)
        raise TimeoutError(f"RPC call to {method} timed out.")

    calls = RankCalls(silent, AttentionOffloadConfig((NODE,), **SECONDS))
    attachments = [[Attachment(NODE, "session", "token", 0, 1)]]
    with pytest.raises(RankSilentError, match=r"has not answered for 13 s; its host"):
        calls.attach(attachments, "heads", None)
    for within_s in (20.0, -1.0):
        with pytest.raises(RankSilentError, match="to connect to the memory nodes and"):
            calls.attach(attachments, "heads", within_s)
        with pytest.raises(RankSilentError, match="start all of them again"):
            calls.discard_step(within_s)
    with pytest.raises(RankSilentError, match="asked for its options"):
        calls.check_options()
    assert waited == [13.0, 20.0, 20.0, 6.0, 3.0, 7.0]


def test_worker_of_vllm() -> None:
    """vLLM gives the text of what a rank without our worker raised."""

    def call(method: str, **_: Any) -> list[Any]:
        raise RuntimeError(
            f"Worker failed with error ''Worker' object has no attribute '{method}'', "
            "please check the stack trace above for the root cause"
        )

    with pytest.raises(ValueError, match="was started without attention offloading"):
        RankCalls(call, LEADER).check_options()
