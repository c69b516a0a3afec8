# SPDX-License-Identifier: Apache-2.0
"""All memory nodes of one worker, as one attention."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from vllm_attn_offload.client.node_client import NodeClient


@dataclass(slots=True)
class ExchangeTimes:
    """Where a worker's time goes, summed over layers, in seconds."""

    num_steps: int = 0
    num_layer_calls: int = 0
    pack_s: float = 0.0
    send_s: float = 0.0
    wait_s: float = 0.0


class NodeGroup:
    """Sends a layer to the nodes that hold the KV blocks and collects the output.

    Args:
        clients: One data channel per node; this release serves an engine from one.
    """

    def __init__(self, clients: list[NodeClient]) -> None:
        (self._client,) = clients
        self._times = ExchangeTimes()
        self._step = 0

    def begin_step(self, payloads: list[tuple[int, memoryview]]) -> int:
        """Send a step's metadata.

        Args:
            payloads: KV group and encoded STEP, one per group.

        Returns:
            The step's number, for ``attend``.
        """
        self._step += 1
        self._times.num_steps += 1
        for group, payload in payloads:
            self._client.post_step(self._step, group, payload)
        return self._step

    def attend(self, step: int, layer: int, qkv: memoryview, out: memoryview) -> None:
        """Store a layer's k, v on the nodes and attend with its q.

        Args:
            step: Result of ``begin_step``.
            layer: Index of the layer in the session's geometry.
            qkv: ``[num_tokens, row width]`` bytes in the session's dtype.
            out: Filled with ``[num_tokens, num_query_heads * v_head_size]``.

        Raises:
            MemoryNodeError: A node is gone, too slow, or refused the layer.
        """
        started = time.perf_counter()
        self._client.post_layer(step, layer, qkv)
        sent = time.perf_counter()
        self._client.receive_out(layer, out)
        times = self._times
        times.send_s += sent - started
        times.wait_s += time.perf_counter() - sent
        times.num_layer_calls += 1

    def add_pack_time(self, seconds: float) -> None:
        """Account for the copy of q, k, v into one buffer."""
        self._times.pack_s += seconds

    def times(self) -> dict[str, float]:
        """Sums since the group was made."""
        return asdict(self._times)

    def close(self) -> None:
        """End all data channels."""
        self._client.close()
