# SPDX-License-Identifier: Apache-2.0
"""Every architecture of transformers and vLLM: the planner's memory against vLLM's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vllm_attn_offload.planner.model.config import read_configs
from vllm_attn_offload.planner.model.layers import layer_shapes
from vllm_attn_offload.planner.model.states import recurrent_states

SPARSE, ENCODER, NO_ATTENTION = "attends sparsely", "encoder-decoder", "No layer of"
REFUSED = {
    "CohereAsrForConditionalGeneration": ENCODER,
    "DeepseekV32ForCausalLM": SPARSE,
    "DeepseekV4ForCausalLM": SPARSE,
    "FalconMambaForCausalLM": NO_ATTENTION,
    "Glm5NextForConditionalGeneration": SPARSE,
    "GlmMoeDsaForCausalLM": SPARSE,
    "HYV4ForCausalLM": SPARSE,
    "Mamba2ForCausalLM": NO_ATTENTION,
    "MambaForCausalLM": NO_ATTENTION,
    "MiniMaxM3SparseForConditionalGeneration": SPARSE,
    "Qwen4ExpForCausalLM": "layers of type indexed_attention",
    "Qwen4ExpForConditionalGeneration": "layers of type indexed_attention",
    "WhisperForConditionalGeneration": ENCODER,
}
#: Their states are refused: convolutions, in one more KV cache of vLLM per layer.
#: Their class can be made next to torch's CUDA build; without one, vLLM's rule leaves
#: the heads of their sliding layers to it.
WITHOUT_RULE = {"InklingForCausalLM", "InklingForConditionalGeneration"}
#: Compared with the KV caches of vLLM's classes, where this machine can make them;
#: it can make more of them with torchvision.
MIN_COMPARED = 85
#: Architectures with recurrent states whose class, or whose layers, vLLM can make here.
MIN_WITH_STATES, MIN_WITH_LAYERS = 10, 7
Layers = Counter[tuple[float, int | None]]


@pytest.fixture(scope="module")
def replies(architectures: Path) -> Mapping[Path, Any]:
    """What vLLM says, by config.json."""
    lines = (architectures / "replies.jsonl").read_text().splitlines()
    return {
        architectures / reply["name"] / "config.json": reply
        for reply in map(json.loads, lines)
    }


@pytest.fixture(scope="module")
def configs(replies: Mapping[Path, Any]) -> dict[str, Mapping[str, Any]]:
    """Configurations by name, with their classes' defaults filled in."""
    names = [path.parent.name for path in replies]
    return dict(zip(names, read_configs(list(replies)), strict=True))


@pytest.fixture(scope="module")
def planned(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Layers | str]:
    """Bytes per token and window of the layers by name, or why there are none."""
    return {name: _layers(config, name) for name, config in configs.items()}


def _layers(config: Mapping[str, Any], name: str) -> Layers | str:
    layers: Layers = Counter()
    try:
        for group in layer_shapes(config, name):
            if not group.shares_kv:
                layers[2.0 * group.kv_elements, group.window] += group.num_layers
    except ValueError as refusal:
        return str(refusal)
    return layers


def test_kv_of_every_architecture(
    replies: Mapping[Path, Any], planned: Mapping[str, Layers | str]
) -> None:
    """Layer by layer: bytes per token, and which of them only keep a window."""
    asked = {reply["name"]: reply for reply in replies.values()}
    compared = {
        name: Counter(map(tuple, asked[name]["layers"]))
        for name in asked.keys() - REFUSED - WITHOUT_RULE
        if "layers" in asked[name]
    }
    wrong = {
        name: (planned[name], layers)
        for name, layers in compared.items()
        if planned[name] != layers
    }
    assert wrong == {}
    assert len(compared) >= MIN_COMPARED


def test_kv_by_rule_where_no_class_can_be_made(
    replies: Mapping[Path, Any], planned: Mapping[str, Layers | str]
) -> None:
    """vLLM's sizes of a layer, for classes that need a GPU or another package."""
    by_rule = {
        reply["name"]: Counter(map(float, reply["rule"]))
        for reply in replies.values()
        if reply.get("rule") and reply["name"] not in REFUSED.keys() | WITHOUT_RULE
    }
    planned_bytes = {
        name: sum((Counter({b: n}) for (b, _), n in planned[name].items()), Counter())
        for name in by_rule
    }
    # Less where some layers do not attend, or share what others keep.
    wrong = {
        name: (planned_bytes[name], rule)
        for name, rule in by_rule.items()
        if not planned_bytes[name] <= rule
    }
    assert wrong == {}
    unknown = {reply["name"] for reply in replies.values() if not _is_known(reply)}
    assert unknown <= REFUSED.keys()


def _is_known(reply: Mapping[str, Any]) -> bool:
    return "layers" in reply or bool(reply["rule"])


def test_states_of_every_architecture(
    replies: Mapping[Path, Any], configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Bytes of a layer's state by vLLM's classes, and of every layer that keeps one."""
    skipped = REFUSED.keys() | WITHOUT_RULE
    asked = {r["name"]: r for r in replies.values() if r["name"] not in skipped}
    states = {
        name: recurrent_states(config, name, 2.0)
        for name, config in configs.items()
        if name in asked
    }
    by_class = {name: r["state"] for name, r in asked.items() if "state" in r}
    assert {n: states[n].layer_bytes for n in by_class if states[n]} == by_class
    by_layers = {n: Counter(r["states"]) for n, r in asked.items() if "states" in r}
    assert by_layers == {
        name: Counter({state.layer_bytes: state.num_layers} if state else {})
        for name, state in states.items()
        if name in by_layers
    }
    assert len(by_class) >= MIN_WITH_STATES
    assert sum(map(bool, by_layers.values())) >= MIN_WITH_LAYERS


@pytest.mark.parametrize("name", sorted(WITHOUT_RULE))
def test_unknown_states_are_refused(
    configs: Mapping[str, Mapping[str, Any]], name: str
) -> None:
    with pytest.raises(ValueError, match="does not know the size of their states"):
        recurrent_states(configs[name], name, 2.0)


def test_refusals_name_the_reason(planned: Mapping[str, Layers | str]) -> None:
    refused = {name: text for name, text in planned.items() if isinstance(text, str)}
    assert refused.keys() == REFUSED.keys()
    assert {n for n, text in refused.items() if REFUSED[n] not in text} == set()
