# SPDX-License-Identifier: Apache-2.0
"""Pages of a node: all there before it serves, huge, and counted where they are not."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from node_process import NodeProcess, running_node
from paged_batch import PagedBatch
from raw_session import (
    as_bytes,
    attach_request,
    encode_step,
    make_geometry,
    reservation,
    session_of,
)

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.messages import Stats

GEOMETRY = make_geometry(num_layers=30)
NUM_BLOCKS, NUM_REQS, NUM_TOKENS = 256, 16, 40
KV_BYTES = NUM_BLOCKS * 30 * 2 * 16 * 3 * 64 * 4
WARM_UP_STEPS, NUM_STEPS = 8, 100
TIMEOUT_S = 10.0
#: Of the interpreter, in passing; the frames of a single layer have 24 pages.
MAX_FAULTS = 100
OPTIONS = ("--kv-cache-gib", "0.4", "--preallocate")


class Decoding:
    """A session through shared memory that decodes; blocks are written as it grows."""

    def __init__(self, node: NodeProcess) -> None:
        self.control = ControlClient(node.address, TIMEOUT_S)
        reserved = self.control.reserve(reservation(GEOMETRY, KV_BYTES))
        opened = self.control.open_session(session_of(reserved.reservation, NUM_BLOCKS))
        attach = attach_request(opened, GEOMETRY)
        self._client = NodeClient(node.address, attach, TIMEOUT_S)
        self._batch = PagedBatch(GEOMETRY, NUM_BLOCKS, NUM_REQS)
        self._number = 0
        self.step(NUM_TOKENS)

    def step(self, num_new: int = 1) -> None:
        """Grow every request, and attend in all layers."""
        step, qkv = self._batch.grow([num_new] * NUM_REQS)
        out = memoryview(bytearray(step.num_query_rows * 9 * 64 * 4))
        self._number += 1
        self._client.post_step(self._number, 0, 0, encode_step(step))
        flags, payload = FrameFlag.FUSED.value, as_bytes(qkv)
        for layer in range(len(GEOMETRY.layers)):
            self._client.post_layer(
                self._number, 0, layer, flags, payload, has_queries=True
            )
            self._client.receive_out(layer, out)

    def stats(self) -> Stats:
        """Counters of the node."""
        return self.control.stats()

    def close(self) -> None:
        """End the session."""
        self._client.close()
        self.control.close()


@pytest.mark.parametrize("kernel", ["cpp", "torch"])
def test_no_page_faults_while_it_serves(tmp_path: Path, kernel: str) -> None:
    """With its memory taken at start, however many layers come."""
    options = (*OPTIONS, "--attention-kernel", kernel)
    num_steps = NUM_STEPS if kernel == "cpp" else NUM_STEPS // 5
    with running_node(tmp_path, *options) as node, closing(Decoding(node)) as decoding:
        for _ in range(WARM_UP_STEPS):
            decoding.step()
        before = decoding.stats()
        for _ in range(num_steps):
            decoding.step()
        after = decoding.stats()
        assert after.num_minor_faults - before.num_minor_faults < MAX_FAULTS


def test_first_touches_are_counted(tmp_path: Path) -> None:
    """As the kernel counts them, from the moment that the node serves."""
    with running_node(tmp_path, *OPTIONS) as node:
        with closing(ControlClient(node.address, TIMEOUT_S)) as control:
            assert control.stats().num_minor_faults < faults(node)
        with closing(Decoding(node)) as decoding:
            before, counted = faults(node), decoding.stats().num_minor_faults
            for _ in range(10):
                decoding.step()
            assert 0 < counted <= before
            assert decoding.stats().num_minor_faults - counted <= faults(node) - before


def faults(node: NodeProcess) -> int:
    """Minor faults of a node's process, by the kernel's own count."""
    text = Path(f"/proc/{node.process.pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[7])
