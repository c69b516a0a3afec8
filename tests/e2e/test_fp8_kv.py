# SPDX-License-Identifier: Apache-2.0
"""A KV cache of fp8 end to end: chunks and hits change nothing, scales are loaded.

Logits are those of rounded keys and values in transformers. They are not those of
stock vLLM on CPUs, whose kernel rounds towards zero; nodes round to the nearest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fp8_cases
import pytest
import tiny_families
import torch
from equality import MAX_BF16_GAP, bf16_gaps
from fp8_reference import reference_distribution
from node_process import NodeProcess
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
TIMEOUT_S = 600
#: Of log-probabilities. After sums of another order a number at the edge between two of
#: fp8 may fall on either side; then a logit moves by a part of what fp8 costs.
MAX_GAP = 5e-3
MAX_KL_RATIO = 1.1
NUM_LAYERS = 4
#: In fp32, where few numbers are rounded to another side; fp8 itself costs 0.0075.
MAX_KL = 1e-4
#: Of k and v, by layer; no powers of two.
SCALES = [(0.03 * (1 + layer), 0.011 * (2 + layer)) for layer in range(NUM_LAYERS)]
PROMPT = fp8_cases.families.prompts()[0][-1]
PARTS = ("tokens", "logprobs", "gaps")
Result = dict[str, Any]
Once = Callable[[str, Callable[[Path], None]], Path]


def save_models(directory: Path) -> None:
    """A random model whose tokens depend on attention, but do not jump with fp8."""
    torch.manual_seed(0)
    changes = {"initializer_range": 0.15, "num_hidden_layers": NUM_LAYERS}
    config = AutoConfig.for_model("llama", **(tiny_families.BASE | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    for name in ("plain", "scales"):
        model.save_pretrained(directory / name)
    add_scales(directory / "scales")


def add_scales(model: Path) -> None:
    """Make it a checkpoint with a quantised KV cache, as llm-compressor writes it."""
    weights = load_file(model / "model.safetensors")
    for layer, (k_scale, v_scale) in enumerate(SCALES):
        prefix = f"model.layers.{layer}.self_attn"
        weights[f"{prefix}.k_scale"] = torch.tensor([k_scale])
        weights[f"{prefix}.v_scale"] = torch.tensor([v_scale])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "kv_cache_scheme": scheme | {"dynamic": False, "symmetric": True},
    }
    (model / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def models(once: Once) -> Path:
    return once("fp8-models", save_models)


@pytest.fixture(scope="module")
def results(once: Once, models: Path, node_cpu: str) -> dict[str, Result]:
    """Of all cases, on nodes whose unwritten blocks hold NaN."""

    def generate(directory: Path) -> None:
        options = ("--kv-cache-gib", "0.2", "--cpus", node_cpu)
        with ExitStack() as stack:
            nodes = [
                NodeProcess(
                    "127.0.0.1:0",
                    directory / f"node-{index}.log",
                    *options,
                    ATTN_OFFLOAD_POISON_KV="1",
                )
                for index in range(2)
            ]
            for node in nodes:
                stack.callback(node.kill)
            output = directory / "result.json"
            process = subprocess.run(
                [
                    *(sys.executable, str(HERE / "fp8_cases.py"), str(models)),
                    *(str(output), *(node.address for node in nodes)),
                ],
                env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            tail = process.stderr[-6000:] + process.stdout[-4000:]
            assert process.returncode == 0, tail
            (directory / "log").write_text(process.stderr + process.stdout)

    output = once("fp8-results", generate) / "result.json"
    return json.loads(output.read_text("utf-8"))


def completions(result: Result) -> list[Result]:
    rows = zip(*(result[part] for part in PARTS), strict=True)
    return [dict(zip(PARTS, row, strict=True)) for row in rows]


def assert_alike(ours: Result, theirs: Result, max_gap: float = MAX_GAP) -> None:
    """Tokens are equal but where two are close, and so are log-probabilities."""
    found, expected = completions(ours), completions(theirs)
    gaps = bf16_gaps(expected, found)
    assert all(gap <= max_gap for gap in gaps), gaps
    same = [
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        if one["tokens"] == other["tokens"]
        for a, b in zip(one["logprobs"], other["logprobs"], strict=True)
    ]
    assert max(same) <= max_gap


def test_chunks_change_nothing(results: dict[str, Result]) -> None:
    """Prefills here attend to what the nodes store, wherever prompts are cut."""
    assert_alike(results["chunks"], results["whole"])


def test_chunks_change_nothing_in_bf16(results: dict[str, Result]) -> None:
    assert_alike(results["bf16 in chunks"], results["bf16"], MAX_BF16_GAP)


def test_prefix_hits_change_nothing(results: dict[str, Result]) -> None:
    """The same prompts, with all of their blocks cached."""
    whole = results["whole"]
    again = {part: [each[part] for each in whole["again"]] for part in PARTS}
    first = {part: whole[part][: len(again[part])] for part in PARTS}
    assert whole["hits"] > sum(map(len, fp8_cases.families.prompts()[0])) // 2
    assert_alike(again, first)


def test_pool_of_equal_bytes_holds_more(results: dict[str, Result]) -> None:
    quantised, plain = (
        results[case]["pool_tokens"] for case in ("bf16", "unquantised bf16")
    )
    assert quantised >= 1.9 * plain


@pytest.mark.parametrize(
    ("case", "scales"), [("chunks", [(1.0, 1.0)] * NUM_LAYERS), ("scales", SCALES)]
)
def test_logits_are_those_of_rounded_kv(
    results: dict[str, Result],
    models: Path,
    case: str,
    scales: list[tuple[float, float]],
) -> None:
    """Scales are the checkpoint's, which asks for fp8 itself."""
    exact = reference_distribution(models / "plain", PROMPT, torch.float32, scales)
    assert divergence(exact, distribution(results[case])) < MAX_KL
    assert results[case]["pool_tokens"] == results["whole"]["pool_tokens"]


def test_bf16_costs_no_more_than_it_must(
    results: dict[str, Result], models: Path
) -> None:
    """Divergence from stock's unquantised cache: that of rounding in transformers."""
    model = models / "plain"
    plain, quantised = (
        reference_distribution(model, PROMPT, torch.bfloat16, scales)
        for scales in (None, [(1.0, 1.0)] * NUM_LAYERS)
    )
    found = divergence(
        *map(distribution, (results["unquantised bf16"], results["bf16"]))
    )
    assert 0 < found <= MAX_KL_RATIO * divergence(plain, quantised)


@pytest.mark.parametrize(
    ("case", "stock", "dtype"),
    [
        ("chunks", "stock", torch.float32),
        ("bf16", "stock bf16", torch.bfloat16),
    ],
)
def test_stock_costs_no_less(
    results: dict[str, Result], models: Path, case: str, stock: str, dtype: torch.dtype
) -> None:
    if refusal := results[stock].get("refused"):
        pytest.skip(f"stock vLLM on this CPU: {refusal}")
    plain = reference_distribution(models / "plain", PROMPT, dtype, None)
    ours, theirs = (
        divergence(plain, distribution(results[name])) for name in (case, stock)
    )
    assert ours <= MAX_KL_RATIO * theirs


def distribution(result: Result) -> torch.Tensor:
    return torch.tensor(result["distribution"], dtype=torch.float64)


def divergence(plain: torch.Tensor, other: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of log-probabilities ``[rows, vocabulary]``."""
    return float((plain.exp() * (plain - other)).sum(-1).mean())
