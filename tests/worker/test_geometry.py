# SPDX-License-Identifier: Apache-2.0
"""Groups, storages and capacity are those of vLLM, for random sets of layers."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import tiny_llama
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_attn_offload.engine.kv_cache_plan import plan_kv_cache
from vllm_attn_offload.memory_node.decode_attention.torch_attention import (
    TorchDecodeAttention,
)
from vllm_attn_offload.memory_node.kv_cache import bytes_per_block
from vllm_attn_offload.plugin import BACKEND_PATH
from vllm_attn_offload.worker.geometry import session_geometry

POOL_BYTES = 1 << 30
NUM_SETS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama.save(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def _offloading_backend() -> Iterator[None]:
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)
    selector._cached_get_attn_backend.cache_clear()
    yield
    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()


def configure(model: str, *, has_hma: bool = True, **options: Any) -> VllmConfig:
    config = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        disable_hybrid_kv_cache_manager=not has_hma,
        **(tiny_llama.engine_options() | options),
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"  # the engine core chooses it
    return config


def make_layers(config: VllmConfig, kinds: list[dict[str, Any]]) -> None:
    """Layers of vLLM, which find their way into the configuration."""
    with set_current_vllm_config(config):
        for index, kind in enumerate(kinds):
            Attention(
                kind["heads"],
                kind["size"],
                scale=1.0,
                num_kv_heads=kind["kv_heads"],
                cache_config=config.cache_config,
                per_layer_sliding_window=kind["window"],
                prefix=f"layers.{index}",
            )


def group(config: VllmConfig) -> KVCacheConfig:
    """As the executor does."""
    layers = config.compilation_config.static_forward_context
    specs = {name: each.get_kv_cache_spec(config) for name, each in layers.items()}
    (planned,) = plan_kv_cache(config, [copy.deepcopy(specs)], [POOL_BYTES])
    return planned


def random_kinds(choose: random.Random) -> list[dict[str, Any]]:
    """Full layers and windows of one width, of one or two shapes."""
    shapes = [(choose.choice([1, 2, 4]), choose.choice([32, 64, 128]))]
    shapes.append(choose.choice([shapes[0], (shapes[0][0], 2 * shapes[0][1])]))
    window = choose.choice([32, 100])
    kinds = []
    for _ in range(choose.randint(1, 14)):
        is_local = choose.random() < 0.6
        kv_heads, size = shapes[is_local]
        kinds.append(
            {
                "heads": kv_heads * choose.choice([1, 2, 4]),
                "kv_heads": kv_heads,
                "size": size,
                "window": window if is_local else None,
            }
        )
    return kinds


@pytest.mark.parametrize("has_hma", [True, False], ids=["HMA", "no HMA"])
def test_capacity_is_that_of_vllm(model: str, has_hma: bool) -> None:
    """Nodes hold as many blocks as vLLM makes of the same bytes, exactly."""
    num_groups = []
    for seed in range(NUM_SETS):
        config = configure(model, has_hma=has_hma)
        make_layers(config, random_kinds(random.Random(seed)))
        planned = group(config)
        geometry = session_geometry(config, planned)
        node_bytes = bytes_per_block(geometry, TorchDecodeAttention())
        assert POOL_BYTES // node_bytes == planned.num_blocks, seed
        assert [each.block_size for each in geometry.groups] == [
            each.kv_cache_spec.block_size for each in planned.kv_cache_groups
        ]
        num_groups.append(len(geometry.groups))
    assert (max(num_groups) > 1) == has_hma


def test_gpt_oss_like_model_holds_what_stock_holds(model: str) -> None:
    """Half of its layers have a window, and cost only its blocks."""
    config = configure(model, has_hma=True)
    kind = {"heads": 8, "kv_heads": 2, "size": 64}
    make_layers(config, [kind | {"window": [128, None][i % 2]} for i in range(12)])
    planned = group(config)
    geometry = session_geometry(config, planned)
    assert [layer.group for layer in geometry.layers].count(0) == 6
    assert {layer.storage for layer in geometry.layers} == set(range(6))
    assert [layer.sliding_window for layer in geometry.layers] == [128, 0] * 6
    assert POOL_BYTES // bytes_per_block(geometry, TorchDecodeAttention()) == (
        planned.num_blocks
    )


def test_layers_that_differ_are_one_group(model: str) -> None:
    """As Nemotron-NAS: no padding, a storage each."""
    config = configure(model, has_hma=True)
    kinds = [
        {"heads": 4, "kv_heads": count, "size": 64, "window": None}
        for count in (2, 4, 2, 1)
    ]
    make_layers(config, kinds)
    planned = group(config)
    geometry = session_geometry(config, planned)
    assert len(geometry.groups) == 1
    assert [layer.num_kv_heads for layer in geometry.layers] == [2, 4, 2, 1]
    assert len({layer.storage for layer in geometry.layers}) == 4
    assert bytes_per_block(geometry, TorchDecodeAttention()) == (
        sum(2 * k["kv_heads"] * 64 * tiny_llama.BLOCK_SIZE * 4 for k in kinds)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_blocks_are_those_of_vllm(model: str, dtype: str) -> None:
    """A byte an element, whatever travels; scales are those that vLLM loaded."""
    config = configure(model, dtype=dtype, kv_cache_dtype="fp8")
    kind = {"heads": 8, "kv_heads": 2, "size": 64}
    make_layers(config, [kind | {"window": [128, None][i % 2]} for i in range(4)])
    layers = config.compilation_config.static_forward_context
    for index, layer in enumerate(layers.values()):
        layer._k_scale_float, layer._v_scale_float = 0.25 + index, 2.0 * index + 1
    geometry = session_geometry(config, planned := group(config))
    assert (geometry.dtype, geometry.kv_dtype) == (dtype, "fp8_e4m3")
    scales = [(layer.k_scale, layer.v_scale) for layer in geometry.layers]
    assert scales == [(0.25, 1.0), (1.25, 3.0), (2.25, 5.0), (3.25, 7.0)]
    node_bytes = bytes_per_block(geometry, TorchDecodeAttention())
    assert node_bytes == 2 * 2 * 64 * tiny_llama.BLOCK_SIZE * 2
    assert POOL_BYTES // node_bytes == planned.num_blocks


def test_kv_caches_of_several_dtypes_are_refused(model: str) -> None:
    config = configure(model, kv_cache_dtype="fp8")
    kind = {"heads": 4, "kv_heads": 2, "size": 64, "window": None}
    make_layers(config, [kind] * 2)
    planned = group(config)
    layers = config.compilation_config.static_forward_context
    layers["layers.1"].kv_cache_dtype = "auto"
    with pytest.raises(ValueError, match=r"layers\.0 has fp8, layers\.1 has auto. All"):
        session_geometry(config, planned)


@pytest.mark.parametrize("name", ["k", "v"])
def test_scales_per_head_are_refused(model: str, name: str) -> None:
    """Wherever the checkpoint asked for them; vLLM's one number is the largest."""
    config = configure(model, kv_cache_dtype="fp8")
    make_layers(config, [{"heads": 4, "kv_heads": 2, "size": 64, "window": None}])
    layers = config.compilation_config.static_forward_context
    setattr(layers["layers.0"], f"_{name}_scale", torch.tensor([0.5, 2.0]))
    planned = group(config)
    message = rf"layers\.0 has 2 {name} scales of its KV cache. Allowed: one per"
    with pytest.raises(ValueError, match=message):
        session_geometry(config, planned)


def test_layers_without_fp8_have_no_scales(model: str) -> None:
    """Checkpoints may bring scales for a KV cache that is asked for in 16 bits."""
    config = configure(model, dtype="bfloat16", kv_cache_dtype="bfloat16")
    make_layers(config, [{"heads": 4, "kv_heads": 2, "size": 64, "window": None}])
    layers = config.compilation_config.static_forward_context
    layers["layers.0"]._k_scale_float = 0.5
    geometry = session_geometry(config, group(config))
    assert geometry.kv_dtype is None
    assert geometry.layers[0].k_scale == 1.0
