# SPDX-License-Identifier: Apache-2.0
"""Model families with windows, caps, sinks, slopes, several KV groups, shared KV."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_families
from equality import MAX_BF16_GAP, bf16_gaps
from node_process import NodeProcess

HERE = Path(__file__).parent
NUM_NODES = 3
TIMEOUT_S = 900
MAX_LOGPROB_DIFFERENCE = 1e-4
#: Different ones that a random model says; one that said one only would prove little.
MIN_TOKENS = 6
SMALL_POOLS = ["gemma3 in a small pool", "nemotron_h in a small pool"]
#: Cases in bf16, where rounding decides between tokens that are close.
BF16 = [
    name
    for name, case in families.CASES.items()
    if families.MODELS.get(case["model"], {}).get("dtype") == "bfloat16"
]
#: Cases in which prefixes are looked for, and the pool has room for them.
CACHING = [
    name
    for name, case in families.CASES.items()
    if families.MODELS.get(case["model"], {}).get("enable_prefix_caching", True)
    and name not in SMALL_POOLS
]
#: Layers that attend, and bytes of a state of each other layer, by model.
STATES = {
    # vLLM keeps conv_L_cache - 1 numbers of each channel.
    "lfm2": (2, 4 * [2 * 128 * 4]),
    "nemotron_h": (2, [families.NEMOTRON_H_STATE_BYTES // 2] * 2),
}

pytestmark = pytest.mark.long
Result = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by family."""
    directory = tmp_path_factory.mktemp("families")
    for family in sorted({case["model"] for case in families.CASES.values()}):
        tiny_families.save(family, directory / family)
    return directory


@pytest.fixture(scope="module")
def stock(models: Path) -> Result:
    """Results of stock vLLM by family."""
    return run(models, [])


@pytest.fixture(scope="module")
def offloaded(models: Path, node_cpu: str) -> Result:
    """Results by case, with nodes whose unwritten blocks hold NaN."""
    with ExitStack() as stack:
        nodes = []
        for index in range(NUM_NODES):
            node = NodeProcess(
                "127.0.0.1:0",
                models / f"node-{index}.log",
                *("--kv-cache-gib", "0.1", "--cpus", node_cpu),
                ATTN_OFFLOAD_POISON_KV="1",
            )
            stack.callback(node.kill)
            nodes.append(node)
        return run(models, [node.address for node in nodes])


def run(models: Path, addresses: list[str]) -> Result:
    output = models / f"result-{len(addresses)}.json"
    child = subprocess.run(
        [sys.executable, str(HERE / "families.py"), str(models), str(output)]
        + addresses,
        env=os.environ
        # In this process: one import of vLLM less per engine.
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "ATTN_OFFLOAD_POISON_KV": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert child.returncode == 0, child.stderr[-4000:] + child.stdout[-4000:]
    return json.loads(output.read_text("utf-8"))


@pytest.mark.parametrize("case", [name for name in families.CASES if name not in BF16])
def test_equals_stock(stock: Result, offloaded: Result, case: str) -> None:
    """Every token, and the log-probabilities within 1e-4."""
    theirs, ours = stock[families.CASES[case]["model"]], offloaded[case]
    assert ours["tokens"] == theirs["tokens"]
    assert len({token for tokens in theirs["tokens"] for token in tokens}) > MIN_TOKENS
    worst = max(
        abs(a - b)
        for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True)
        for a, b in zip(mine, other, strict=True)
    )
    assert worst <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("case", BF16)
def test_parts_where_rounding_decides(
    stock: Result, offloaded: Result, case: str
) -> None:
    """Which is late, or never, in most sequences: afterwards nothing is compared."""
    theirs, ours = stock[families.CASES[case]["model"]], offloaded[case]
    answers = [
        [
            {"tokens": tokens, "gaps": gaps}
            for tokens, gaps in zip(result["tokens"], result["gaps"], strict=True)
        ]
        for result in (theirs, ours)
    ]
    gaps = bf16_gaps(*answers)
    assert all(gap <= MAX_BF16_GAP for gap in gaps), gaps
    num_equal = sum(
        len(os.path.commonprefix(pair))
        for pair in zip(theirs["tokens"], ours["tokens"], strict=True)
    )
    assert num_equal >= sum(map(len, theirs["tokens"])) / 2, gaps


@pytest.mark.parametrize("case", CACHING)
def test_prefixes_are_hit(offloaded: Result, case: str) -> None:
    """Also where all but the end of a prefix has fallen out of the window."""
    assert offloaded[case]["hits"] > 0


@pytest.mark.parametrize("case", ["lfm2", "qwen3_next"])
def test_states_are_hit_like_stock(stock: Result, offloaded: Result, case: str) -> None:
    """A prefix is one where its KV and its states are cached, in pools apart."""
    assert offloaded[case]["hits"] == stock[case]["hits"]


@pytest.mark.parametrize("case", ["lfm2", "nemotron_h", "nemotron_h with few states"])
def test_compute_node_holds_states_and_a_stub(offloaded: Result, case: str) -> None:
    """To the byte: a block of the layers that attend, N states of the others."""
    settings = families.CASES[case]
    num_attending, state_bytes = STATES[settings["model"]]
    is_caching = settings["model"] == "lfm2"
    # Each request's state; with prefix caching also that before, and room for those of
    # prefixes; vLLM's empty one.
    count = families.ENGINE["max_num_seqs"] * (4 * 2 if is_caching else 1) + 1
    if "resident_state_gib" in settings.get("offload", {}):
        count = 3
    assert offloaded[case]["state_bytes"] == [count * sum(state_bytes)]
    token_bytes = num_attending * 2 * 2 * 32 * 4
    block_size = offloaded[case]["block_size"]
    assert offloaded[case]["stub_bytes"] == [block_size * token_bytes]


def test_few_states_are_enough(offloaded: Result) -> None:
    """Requests wait for one another's states, and nobody is preempted for them."""
    assert offloaded["nemotron_h with few states"]["preemptions"] == 0


@pytest.mark.parametrize(
    "case", ["phi3", "gpt_oss", "gemma4", "lfm2", "nemotron_h", "qwen3_next"]
)
def test_as_many_blocks_as_stock(stock: Result, offloaded: Result, case: str) -> None:
    """In as many bytes, with the hybrid KV cache manager on."""
    model = families.CASES[case]["model"]
    assert offloaded[case]["num_blocks"] == stock[model]["num_blocks"]


@pytest.mark.parametrize("case", SMALL_POOLS)
def test_preempted(offloaded: Result, case: str) -> None:
    assert offloaded[case]["preemptions"] > 0


def test_steps_were_cut(offloaded: Result) -> None:
    """Steps of several KV groups run in two micro-batches."""
    (times,) = offloaded["gemma4"]["times"]
    assert times["num_cut_steps"] > 0
