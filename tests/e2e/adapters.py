# SPDX-License-Identifier: Apache-2.0
"""Requests of one batch that use different LoRA adapters, and none."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import workload

RANK, NUM_TOKENS = 8, 24
#: SmolLM2-135M: hidden size, and (in, out) of what is adapted.
_NUM_LAYERS = 30
_MODULES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.v_proj": (576, 192),
    "mlp.down_proj": (1536, 576),
}
#: Of the adapters; large enough that every one changes the tokens.
_SCALE = 0.03
ENGINE_OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": RANK,
    # One more than there are: for rows without an adapter vLLM's CPU kernels take the
    # last slot's weights (`lora/ops/torch_ops/lora_ops.py`, index -1).
    "max_loras": 3,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
}


def generate(llm: Any, phrases: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of six requests; neighbours in the batch use different adapters."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with tempfile.TemporaryDirectory(prefix="lora-") as folder:
        first, second = (
            LoRARequest(f"adapter-{n}", n, _save(Path(folder, str(n)), seed=n))
            for n in (1, 2)
        )
        outputs = llm.generate(
            [
                {"prompt_token_ids": workload.repeated(phrase, 40 + 9 * index)}
                for index, phrase in enumerate([*phrases[:2] * 3])
            ],
            params,
            use_tqdm=False,
            lora_request=[first, second, None, first, second, None],
        )
    return [list(output.outputs[0].token_ids) for output in outputs]


def _save(folder: Path, seed: int) -> str:
    """Write random weights as PEFT does."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(_NUM_LAYERS):
        for module, (size_in, size_out) in _MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for part, shape in (("A", (RANK, size_in)), ("B", (size_out, RANK))):
                values = _SCALE * torch.randn(shape, generator=generator)
                weights[f"{name}.lora_{part}.weight"] = values
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [module.split(".")[1] for module in _MODULES],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)
