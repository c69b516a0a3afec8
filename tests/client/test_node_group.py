# SPDX-License-Identifier: Apache-2.0
"""A worker's exchange with a node through the classes that the worker uses."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from node_process import NodeProcess
from paged_batch import PagedBatch
from raw_session import (
    attach_request,
    encode_step,
    make_geometry,
    reservation,
    session_of,
)

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.node_group import NodeGroup
from vllm_attn_offload.errors import MemoryNodeError

NUM_BLOCKS = 8
GEOMETRY = make_geometry()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")


class Worker:
    """One request on a session of its own, over ``NodeGroup``."""

    def __init__(self, address: str, timeout_s: float = 10.0) -> None:
        self._batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 1)
        self.control = ControlClient(address, 10)
        reserved = self.control.reserve(reservation(GEOMETRY, 1 << 20))
        opened = self.control.open_session(session_of(reserved.reservation, NUM_BLOCKS))
        attach = attach_request(opened, GEOMETRY)
        self.nodes = NodeGroup([NodeClient(address, attach, timeout_s)])

    def step(self, num_new: int, *, layer: int = 0, num_bytes: int = 0) -> float:
        """Run a step on both layers; the largest error of the outputs."""
        step, qkv = self._batch.grow([num_new])
        number = self.nodes.begin_step([(0, encode_step(step))])
        out = torch.full((num_new, 9, 64), torch.nan)
        for index in (layer, 1):
            target = as_bytes(out)[num_bytes:]
            self.nodes.attend(number, index, as_bytes(qkv), target)
        exact, _ = self._batch.expected(torch.float64)
        return float((out - exact).abs().max())


def test_attend(node: NodeProcess) -> None:
    worker = Worker(node.address)
    assert worker.step(40) < 1e-5
    assert worker.step(1) < 1e-5
    times = worker.nodes.times()
    assert (times["num_steps"], times["num_layer_calls"]) == (2, 4)
    assert times["wait_s"] > 0
    worker.nodes.close()
    worker.control.close()


def test_refusal_of_the_node(node: NodeProcess) -> None:
    """The node's sentence reaches the worker."""
    worker = Worker(node.address)
    with pytest.raises(MemoryNodeError, match=r"layer 7; this session has 2"):
        worker.step(1, layer=7)
    with pytest.raises(MemoryNodeError, match="its session was lost"):
        worker.step(1)
    worker.control.close()


def test_output_of_another_size(node: NodeProcess) -> None:
    worker = Worker(node.address)
    with pytest.raises(MemoryNodeError, match="2,304 bytes of output; 2,300 expected"):
        worker.step(1, num_bytes=4)
    worker.control.close()


def test_node_hangs_and_is_killed(mortal_node: NodeProcess) -> None:
    """A stopped process answers nothing; the deadline ends the wait."""
    first, second = (Worker(mortal_node.address, timeout_s=1.0) for _ in range(2))
    assert first.step(1) < 1e-5
    assert second.step(1) < 1e-5
    os.kill(mortal_node.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(MemoryNodeError, match=r"nothing received for 1\.0 s"):
        first.step(1)
    assert time.monotonic() - started < 4
    mortal_node.kill()
    with pytest.raises(MemoryNodeError, match=r"session was lost \(.*See the log of"):
        second.step(1)
