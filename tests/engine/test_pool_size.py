# SPDX-License-Identifier: Apache-2.0
"""A pool too small for one request is refused where vLLM would refuse it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import tiny_llama
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVCacheSpec

from vllm_attn_offload.client.partition import PartitionKind
from vllm_attn_offload.engine.kv_cache_plan import plan_kv_cache
from vllm_attn_offload.engine.pool_size import check_pool_size

BLOCK_SIZE = tiny_llama.BLOCK_SIZE
SPEC = FullAttentionSpec(
    block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32
)
SPECS: dict[str, KVCacheSpec] = {"layers.0": SPEC, "layers.1": SPEC}
GROUPS = [KVCacheGroupSpec(list(SPECS), SPEC)]
BLOCK_BYTES = 2 * SPEC.page_size_bytes


@dataclass
class Node:
    """Blocks of each rank on a node, of ``block_bytes`` each."""

    address: str
    num_blocks: list[int]
    block_bytes: int = BLOCK_BYTES

    @property
    def kv_bytes(self) -> int:
        return sum(self.num_blocks) * self.block_bytes


@pytest.fixture(scope="module")
def engine_config(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., VllmConfig]:
    model = tmp_path_factory.mktemp("model")
    tiny_llama.save(model)

    def create(**options: Any) -> VllmConfig:
        given = tiny_llama.engine_options() | {"skip_tokenizer_init": True} | options
        config = EngineArgs(model=str(model), **given).create_engine_config()
        config.cache_config.kv_cache_layout = "LBNHC"  # the engine core chooses one
        return config

    return create


def refusal(config: VllmConfig, num_blocks: int, *nodes: Node) -> str:
    """What is said of the pool; empty where it is accepted."""
    partition: PartitionKind = "heads" if len(nodes) == 1 else "blocks"
    try:
        check_pool_size(config, GROUPS, num_blocks, nodes, partition)
    except ValueError as error:
        return str(error)
    return ""


def is_enough_for_vllm(config: VllmConfig, num_blocks: int) -> bool:
    max_model_len = config.model_config.max_model_len
    try:
        plan_kv_cache(config, [dict(SPECS)], [num_blocks * BLOCK_BYTES])
    except ValueError:
        return False
    finally:
        config.model_config.max_model_len = max_model_len  # It may have been fitted.
    return True


@pytest.mark.parametrize("override", [None, 1, 2, 8, 9, 100])
@pytest.mark.parametrize("max_model_len", [-1, 1, 32, 33, 256])
def test_refuses_what_vllm_refuses(
    engine_config: Callable[..., VllmConfig], max_model_len: int, override: int | None
) -> None:
    config = engine_config(
        max_model_len=max_model_len, num_gpu_blocks_override=override
    )
    for num_blocks in (1, 2, 3, 8, 9, 100):
        node = Node("unix:/node", [num_blocks])
        is_refused = bool(refusal(config, num_blocks, node))
        assert is_refused != is_enough_for_vllm(config, num_blocks), num_blocks


def test_says_what_is_held_and_what_helps(
    engine_config: Callable[..., VllmConfig],
) -> None:
    """The size that is advised is enough, and one block less is not."""
    config = engine_config()
    node = Node("unix:/node", [8, 8])
    message = refusal(config, 8, node)
    assert message == (
        "One request of 256 tokens (max_model_len) must fit in the KV cache, and the "
        "memory nodes hold 224 (unix:/node 256 tokens in 0.50 MiB; vLLM keeps one "
        "block of 32 empty). Allowed: at least 0.56 MiB on each node. Set "
        "kv_cache_gib to 0.0005494 or more, which the node must have free "
        "(--kv-cache-gib there), lower --max-model-len to 224 or less, or add a "
        "memory node."
    )
    assert "GiB available" not in message
    (advised,) = re.findall(r"kv_cache_gib to ([0-9.]+)", message)
    num_blocks = int(float(advised) * (1 << 30)) // len(node.num_blocks) // BLOCK_BYTES
    assert num_blocks == 9
    assert not refusal(config, num_blocks, Node("unix:/node", [num_blocks] * 2))


def test_counts_several_nodes_together(
    engine_config: Callable[..., VllmConfig],
) -> None:
    config = engine_config()
    nodes = Node("a:1", [4]), Node("b:2", [2])
    message = refusal(config, 6, *nodes)
    assert "hold 160 (a:1 128 tokens in 0.12 MiB, b:2 64 tokens in 64.00 KiB;" in (
        message
    )
    assert "at least 0.19 MiB on each node" in message
    assert not refusal(config, 9, Node("a:1", [6]), Node("b:2", [3]))


def test_nothing_shorter_fits(engine_config: Callable[..., VllmConfig]) -> None:
    message = refusal(engine_config(), 1, Node("a:1", [1]))
    assert "--max-model-len" not in message
    assert message.endswith("(--kv-cache-gib there), or add a memory node.")


def test_override_is_named(engine_config: Callable[..., VllmConfig]) -> None:
    config = engine_config(num_gpu_blocks_override=8)
    message = refusal(config, 1000, Node("a:1", [1000]))
    assert message == (
        "num_gpu_blocks_override=8 was given. Allowed with max_model_len=256: at least "
        "9 blocks of 32 tokens. Raise it or leave it out, or lower --max-model-len."
    )


def test_model_fits(engine_config: Callable[..., VllmConfig]) -> None:
    assert not refusal(engine_config(), 9, Node("a:1", [9]))
