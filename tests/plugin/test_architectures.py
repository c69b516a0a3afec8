# SPDX-License-Identifier: Apache-2.0
"""Every architecture of transformers and vLLM is served or refused; none breaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

#: Of those that transformers 5.19 and vLLM 0.32 both know. More can be made with
#: torchvision, which no test needs.
MIN_ARCHITECTURES, MIN_JUDGED = 140, 95
#: vLLM's own words for a class that needs a package, a GPU or files of a checkpoint.
UNMAKEABLE = (
    "No module named",
    "requires the timm library",
    "Could not import module",
    "Can't load image processor",
    "Can't load feature extractor",
    "has no attribute",
    "Tried to instantiate dummy base class",
    "Class validation error",
    "is supported only for CUDA",
)

Replies = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def replies(architectures: Path) -> Replies:
    """What vLLM and this plugin say, by architecture."""
    lines = (architectures / "replies.jsonl").read_text().splitlines()
    return {reply["name"]: reply for reply in map(json.loads, lines)}


def test_each_is_served_or_refused(
    replies: Replies, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration that is accepted has layers that are, too."""
    served, refused, unmakeable, broken = [], [], [], {}
    for name, reply in replies.items():
        if reply.get("refusal"):
            refused.append(name)
        elif "layers" in reply and not reply["problems"]:
            served.append(name)
        elif "problems" not in reply and is_unmakeable(reply["error"]):
            unmakeable.append(name)
        else:
            broken[name] = reply
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(replies)} architectures: {len(served)} served, {len(refused)} "
            f"refused from their configuration, {len(unmakeable)} that vLLM cannot "
            "make on this machine.\n"
        )
    assert broken == {}
    assert len(replies) >= MIN_ARCHITECTURES
    assert len(served) + len(refused) >= MIN_JUDGED


def is_unmakeable(error: str) -> bool:
    return any(text in error for text in UNMAKEABLE)


@pytest.mark.parametrize(
    "name",
    [
        "DeepseekV32ForCausalLM",
        "GlmMoeDsaForCausalLM",
        "HYV4ForCausalLM",
        "InklingForConditionalGeneration",
        "KimiLinearForCausalLM",
    ],
)
def test_attention_of_their_own_is_refused_by_name(replies: Replies, name: str) -> None:
    """Most of these classes cannot even be made without a GPU."""
    refusal = replies[name]["refusal"]
    assert f"does not support the attention of {name}. Allowed: " in refusal
    assert "VLLM_MLA_DISABLE" not in refusal


def test_refusals_have_three_parts(replies: Replies) -> None:
    lines = [
        line
        for reply in replies.values()
        for line in reply.get("refusal", "").splitlines()
    ]
    assert lines
    for line in lines:
        assert line.startswith("Attention offloading does not support ")
        assert ". Allowed: " in line
        assert line.endswith(".")
