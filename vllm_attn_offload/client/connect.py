# SPDX-License-Identifier: Apache-2.0
"""Data channels of a worker to all of its memory nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from vllm_attn_offload.client.attachment import Attachment
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import (
    Partition,
    PartitionKind,
    shard_geometry,
)
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.messages import AttachSession
from vllm_attn_offload.transport.cuda_memory import SharedDevice
from vllm_attn_offload.transport.trust import Credentials


def connect_nodes(
    attachments: Sequence[Attachment],
    kind: PartitionKind,
    geometry: SessionGeometry,
    *,
    timeout_s: float,
    credentials: Credentials,
    tolerate_loss: bool,
    worker_kv_bytes: int,
    worker_state_bytes: int,
    device: SharedDevice | None = None,
) -> RemoteAttention:
    """Open a data channel to every node.

    Args:
        attachments: The worker's session on each node.
        kind: What is divided between the nodes.
        geometry: The worker's layers, undivided.
        timeout_s: Deadline for every answer of a node.
        credentials: Token and certificates.
        tolerate_loss: As in `RemoteAttention`.
        worker_kv_bytes: KV cache that the worker holds itself, for the nodes' counters.
        worker_state_bytes: Recurrent states that it holds, likewise.
        device: Device of the layers, where memory of a node can be mapped there.

    Raises:
        MemoryNodeError: A node is gone or refuses the session.
    """
    num_nodes = len(attachments)
    # Parts of several nodes are cut, and merged, on the host.
    device = device if num_nodes == 1 else None
    clients: list[NodeClient] = []
    with contextlib.ExitStack() as opened:
        for node, each in enumerate(attachments):
            digest = shard_geometry(geometry, kind, node, num_nodes).digest()
            request = AttachSession(
                each.session,
                each.attach_token,
                each.generation,
                digest,
                worker_kv_bytes,
                worker_state_bytes=worker_state_bytes,
            )
            trusted = credentials.with_token(each.auth_token)
            client = NodeClient(each.address, request, timeout_s, trusted, device)
            opened.callback(client.close)
            clients.append(client)
        opened.pop_all()
    partition = Partition(kind, tuple(each.num_blocks for each in attachments))
    return RemoteAttention(clients, partition, geometry, tolerate_loss=tolerate_loss)
