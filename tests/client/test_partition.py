# SPDX-License-Identifier: Apache-2.0
"""How blocks and heads are divided between nodes."""

from __future__ import annotations

import numpy as np
import pytest
from raw_session import make_geometry

from vllm_attn_offload.client.partition import (
    Partition,
    choose_partition,
    shard_geometry,
)


@pytest.mark.parametrize("capacities", [(7,), (5, 5), (10, 20, 10), (1, 300)])
def test_block_table_uses_every_block(capacities: tuple[int, ...]) -> None:
    partition = Partition("blocks", capacities)
    homes = set(
        zip(
            partition.node_of_block.tolist(),
            partition.local_block.tolist(),
            strict=True,
        )
    )
    assert len(homes) == partition.num_blocks == sum(capacities)
    assert homes == {(n, i) for n, count in enumerate(capacities) for i in range(count)}


@pytest.mark.parametrize("capacities", [(40, 40), (30, 90), (50, 50, 50)])
def test_block_table_alternates(capacities: tuple[int, ...]) -> None:
    """Any run of ids lies on the nodes in proportion to what they hold."""
    nodes = Partition("blocks", capacities).node_of_block
    shares = np.array(capacities) / sum(capacities)
    for begin in range(0, len(nodes) - 20, 7):
        counts = np.bincount(nodes[begin : begin + 20], minlength=len(capacities))
        assert np.abs(counts - 20 * shares).max() <= 2


def test_nodes_of_a_batch_read_alike() -> None:
    """At batch 16 the busiest node reads at most 1.25 times the mean of all."""
    draw = np.random.default_rng(0)
    nodes = Partition("blocks", (2000, 2000, 2000)).node_of_block
    free = draw.permutation(len(nodes))
    for _ in range(50):
        # Blocks of a request: some in a row, as of a fresh pool, some wherever.
        counts = draw.integers(1, 120, 16)
        begins = draw.integers(0, len(nodes) - 120, 16)
        for order in (np.arange(len(nodes)), free):
            read = sum(
                np.bincount(nodes[order[begin : begin + count]], minlength=3)
                for begin, count in zip(begins, counts, strict=True)
            )
            assert read.max() / read.mean() <= 1.25


def test_heads_need_the_block_everywhere() -> None:
    assert Partition("heads", (40, 30)).num_blocks == 30
    geometry = make_geometry(num_query_heads=12, num_kv_heads=4)
    sharded = shard_geometry(geometry, "heads", 0, 2)
    assert {(x.num_query_heads, x.num_kv_heads) for x in sharded.layers} == {(6, 2)}
    assert shard_geometry(geometry, "blocks", 0, 2) == geometry


@pytest.mark.parametrize(
    ("option", "kv_heads", "num_nodes", "kind"),
    [
        ("auto", 4, 2, "heads"),
        ("auto", 3, 2, "blocks"),
        ("auto", 1, 1, "heads"),
        ("blocks", 4, 2, "blocks"),
    ],
)
def test_choose(option: str, kv_heads: int, num_nodes: int, kind: str) -> None:
    geometry = make_geometry(num_query_heads=3 * kv_heads, num_kv_heads=kv_heads)
    assert choose_partition(option, geometry, num_nodes)[0] == kind


def test_choose_refuses_uneven_heads() -> None:
    with pytest.raises(ValueError, match="2 memory nodes and 3 KV heads") as refusal:
        choose_partition("heads", make_geometry(), 2)
    assert "Use partition='blocks'" in str(refusal.value)
