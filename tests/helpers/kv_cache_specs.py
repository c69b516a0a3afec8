# SPDX-License-Identifier: Apache-2.0
"""Child process: every model class of vLLM with and without offloading, as JSON lines.

A process of its own, because vLLM keeps its process groups and classes for ever.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from architectures import write_configs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import (
    get_model_cls,
    initialize_model,
)
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.config import get_config, get_hf_text_config
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CrossAttentionSpec,
    KVCacheSpec,
    MambaSpec,
)

from vllm_attn_offload.attention.layers import layer_problems
from vllm_attn_offload.compatibility import check_supported
from vllm_attn_offload.plugin import BACKEND_PATH

Layers = dict[str, Any]


def main(folder: Path) -> int:
    """Print one line per architecture, whose config.json is left in ``folder``.

    "refusal" is why its configuration cannot be offloaded, "" where it can; then
    "problems" are those of its layers, made with the offloading backend. "layers" are
    bytes per token and the window of those that keep some per token, "states" bytes of
    those that keep a recurrent state, and "state" of one of these by the class. Where
    this machine cannot make the class: "error", and "rule", the bytes per token of a
    layer that attends by the rules that vLLM has without classes.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as rendezvous:
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{rendezvous}/group", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        for path in write_configs(folder):
            sys.stdout.write(json.dumps({"name": path.name} | ask(path)) + "\n")
    return 0


def ask(folder: Path) -> dict[str, Any]:
    """Everything about one architecture but its name."""
    reply: dict[str, Any] = {}
    try:
        config = _configure(folder)
        reply["refusal"] = _refusal(config)
        _use_backend(is_ours=not reply["refusal"])
        if config.model_config.is_hybrid:
            reply["state"] = _state_bytes(config)
        layers = _build(folder, config)
        if not reply["refusal"]:
            reply["problems"] = layer_problems(config)
        specs = _specs(layers, config)
        return reply | {
            "layers": list(_layers(specs)),
            "states": [
                spec.state_content_size_bytes
                for spec in specs
                if isinstance(spec, MambaSpec)
            ],
        }
    except Exception as error:  # of hundreds of model classes, any
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return reply | {"error": text, "rule": _rule(folder)}


def _refusal(config: VllmConfig) -> str:
    try:
        check_supported(config)
    except ValueError as error:
        return str(error)
    return ""


def _use_backend(*, is_ours: bool) -> None:
    if is_ours:
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)
    else:
        AttentionBackendEnum.CPU_ATTN.clear_override()
    # vLLM chooses once in a process.
    selector._cached_get_attn_backend.cache_clear()


def _rule(folder: Path) -> list[int] | None:
    try:
        config = get_config(str(folder), trust_remote_code=False)
        convert = MODEL_ARCH_CONFIG_CONVERTORS.get(
            config.model_type, ModelArchConfigConvertorBase
        )
        sizes = convert(config, get_hf_text_config(config)).convert()
    except Exception:  # of hundreds of configuration classes, any
        return None
    layers = [sizes[index] for index in range(sizes.total_num_hidden_layers)]
    if sizes.is_deepseek_mla:
        return [2 * layer.head_size for layer in layers]
    return [2 * 2 * layer.total_num_kv_heads * layer.head_size for layer in layers]


def _configure(folder: Path) -> VllmConfig:
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    # In this process; vLLM would start another one to look at each class.
    model_class = ModelRegistry.models[architecture].load_model_cls()
    ModelRegistry.register_model(architecture, model_class)
    config = EngineArgs(
        model=str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ).create_engine_config()
    if config.model_config.is_hybrid:
        # As on a GPU: vLLM widens states on CPUs that compute in bfloat16.
        config.cache_config.mamba_ssm_cache_dtype = "auto"
        if update := MODELS_CONFIG_MAP.get(architecture):
            update.verify_and_update_config(config)
    return config


def _state_bytes(config: VllmConfig) -> int:
    model_class: Any = get_model_cls(config.model_config)
    shapes = model_class.get_mamba_state_shape_from_config(config)
    dtypes = model_class.get_mamba_state_dtype_from_config(config)
    return sum(
        prod(shape) * dtype.itemsize
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _build(folder: Path, config: VllmConfig) -> Layers:
    layers = config.compilation_config.static_forward_context
    try:
        with set_current_vllm_config(config), torch.device("meta"):
            initialize_model(config)
    except (NotImplementedError, RuntimeError) as error:
        # Some compute with their weights while they are made.
        if " meta " not in str(error):
            raise
        layers.clear()
        with set_current_vllm_config(config):
            initialize_model(config)
    return layers


def _specs(layers: Layers, config: VllmConfig) -> list[KVCacheSpec | None]:
    return [
        layer.get_kv_cache_spec(config)
        for layer in layers.values()
        if isinstance(layer, AttentionLayerBase)
        # As vLLM's model runner does: the layer that it names keeps them.
        and not getattr(layer, "kv_sharing_target_layer_name", None)
    ]


def _layers(specs: list[KVCacheSpec | None]) -> Iterator[tuple[float, int | None]]:
    for spec in specs:
        if isinstance(spec, CrossAttentionSpec):
            raise NotImplementedError("cross attention")
        if isinstance(spec, AttentionSpec):
            window = getattr(spec, "sliding_window", None)
            window = window or getattr(spec, "attention_chunk_size", None)
            yield spec.unpadded_page_size_bytes / spec.block_size, window


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
