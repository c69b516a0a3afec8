# SPDX-License-Identifier: Apache-2.0
"""Which device a local memory node gets."""

from __future__ import annotations

import pytest

from vllm_attn_offload.engine.cuda_placement import choose_devices


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
