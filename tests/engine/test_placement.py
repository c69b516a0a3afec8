# SPDX-License-Identifier: Apache-2.0
"""How this host's memory and GPUs are divided between local memory nodes."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from harness import tiny_llama
from vllm.config import ParallelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm_attn_offload.patches import apply_patches

from vllm_attn_offload.config import CONFIG_KEY, AttentionOffloadConfig
from vllm_attn_offload.engine.args import environment_of_one_engine
from vllm_attn_offload.engine.placement import (
    check_local_memory,
    choose_devices,
    local_kv_cache_gib,
)
from vllm_attn_offload.memory_node.memory_claim import unpromised_host_bytes
from vllm_attn_offload.protocol.messages import GIB


def test_local_memory() -> None:
    """A node alone uses its own default; several share what one would take."""
    assert local_kv_cache_gib(AttentionOffloadConfig(), 1) is None
    assert local_kv_cache_gib(AttentionOffloadConfig(kv_cache_gib=2), 3) == 2
    # Nodes of other tests come and go, and so do their promises.
    before = unpromised_host_bytes() / GIB
    share = local_kv_cache_gib(AttentionOffloadConfig(num_local_nodes=2), 2)
    after = unpromised_host_bytes() / GIB
    assert share is not None
    assert 0.5 * min(before, after) < share * 8 < 2 * max(before, after)
    assert share * 8 < psutil.virtual_memory().total / GIB


def total_gib() -> float:
    return psutil.virtual_memory().total / GIB


@pytest.mark.parametrize(("num_nodes", "num_engines"), [(1, 1), (2, 1), (2, 2)])
def test_more_memory_than_there_is(num_nodes: int, num_engines: int) -> None:
    """Nodes of all engines of this host count, each for itself and in all."""
    kv_cache_gib = total_gib() / (num_nodes * num_engines) * 1.01
    config = AttentionOffloadConfig(
        num_local_nodes=num_nodes, kv_cache_gib=kv_cache_gib
    )
    parallel = ParallelConfig(
        data_parallel_size=num_engines, data_parallel_size_local=num_engines
    )
    message = (
        f"kv_cache_gib={kv_cache_gib:g} was given for {num_nodes * num_engines} local "
        f"memory node(s): {kv_cache_gib * num_nodes * num_engines:g} GiB, and "
    )
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_local_memory(config, VllmConfig(parallel_config=parallel))
    (allowed,) = re.findall(r"Allowed: up to ([\d.]+)\. Lower ", str(error.value))
    assert float(allowed) < kv_cache_gib


def test_memory_that_is_not_this_hosts() -> None:
    """Nodes that run elsewhere know their own; a node without a size chooses one."""
    much = total_gib() * 2
    remote = AttentionOffloadConfig(("a:1",), kv_cache_gib=much)
    check_local_memory(remote, VllmConfig())
    check_local_memory(AttentionOffloadConfig(num_local_nodes=64), VllmConfig())
    check_local_memory(AttentionOffloadConfig(kv_cache_gib=0.001), VllmConfig())


def test_refused_with_the_configuration(tmp_path: Path) -> None:
    """By vLLM's own call, before a process is started."""
    apply_patches()
    tiny_llama.save(tmp_path)
    options = {"num_local_nodes": 2, "kv_cache_gib": total_gib() * 0.6}
    arguments = EngineArgs(
        str(tmp_path),
        skip_tokenizer_init=True,
        additional_config={CONFIG_KEY: options},
        **tiny_llama.engine_options(),
    )
    before = psutil.Process().children(recursive=True)
    with environment_of_one_engine(), pytest.raises(ValueError, match="2 local memory"):
        arguments.create_engine_config()
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize(
    ("num_nodes", "engine", "spare", "expected"),
    [
        (1, 0, [], ["cpu"]),
        (1, 0, [1], ["cuda:1"]),
        (1, 1, [2, 3], ["cuda:3"]),
        (2, 0, [2, 3], ["cuda:2", "cuda:3"]),
        (2, 0, [2], ["cpu", "cpu"]),
        (1, 0, [7], ["cpu"]),
    ],
    ids=["none", "one", "second-engine", "two", "too-few", "busy"],
)
def test_choose_devices(
    num_nodes: int, engine: int, spare: list[int], expected: list[str]
) -> None:
    """Idle GPUs only, and all nodes of an engine on the same kind of device."""
    assert choose_devices(num_nodes, engine, spare, lambda gpu: gpu != 7) == expected
