# SPDX-License-Identifier: Apache-2.0
"""A session driven frame by frame, as a correct or a broken worker would."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
from typing import Any

import msgspec
import torch

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind
from vllm_attn_offload.protocol.geometry import (
    Dtype,
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.messages import (
    Attached,
    AttachSession,
    OpenSession,
    ReserveCapacity,
    SessionOpened,
    Shard,
)
from vllm_attn_offload.protocol.step import (
    StepMetadata,
    write_step,
)
from vllm_attn_offload.transport.negotiate import offer_channel, open_worker_channel
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

TIMEOUT_S = 10.0
_names = itertools.count()


def make_geometry(
    *,
    num_query_heads: int = 9,
    num_kv_heads: int = 3,
    head_size: int = 64,
    block_size: int = 16,
    num_layers: int = 2,
    dtype: Dtype = "float32",
) -> SessionGeometry:
    """Equal layers in one KV group, each with its own storage."""
    layers = [
        LayerGeometry(
            name=f"layers.{index}.attn",
            group=0,
            storage=index,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            v_head_size=head_size,
            softmax_scale=head_size**-0.5,
        )
        for index in range(num_layers)
    ]
    return SessionGeometry(dtype, [KVGroup(block_size)], layers)


def make_hybrid_geometry(
    dtype: Dtype = "float32", num_query_heads: int = 6
) -> SessionGeometry:
    """Full and windowed layers that share two storages, in blocks of unequal bytes.

    Layer 0 has a soft cap, 1 ALiBi, 2 reads what 1 stores; 3 and 4 have windows.
    """

    def layer(group: int, storage: int, **changes: Any) -> LayerGeometry:
        num_kv_heads, head_size = ((2, 64), (1, 32))[group]
        shape = (num_query_heads, num_kv_heads, head_size, head_size)
        return LayerGeometry(f"{changes}", group, storage, *shape, 0.1, **changes)

    slopes = tuple(2.0 ** -(head + 1) for head in range(num_query_heads))
    layers = [
        layer(0, 0, soft_cap=3.0),
        layer(0, 1, alibi_slopes=slopes),
        layer(0, 1, stores=False),
        layer(1, 0, sliding_window=40),
        layer(1, 1, sliding_window=40, soft_cap=5.0, alibi_slopes=slopes),
    ]
    return SessionGeometry(dtype, [KVGroup(16), KVGroup(32)], layers)


def reservation(
    geometry: SessionGeometry, kv_bytes: int, *, num_nodes: int = 1
) -> ReserveCapacity:
    """A request for KV memory by an engine with a name of its own."""
    shard = Shard(num_nodes=num_nodes)
    return ReserveCapacity(f"engine-{next(_names)}", shard, geometry, kv_bytes)


def session_of(
    reserved: str, num_blocks: int, max_blocks_per_req: int = 64
) -> OpenSession:
    """A session with limits that the tests stay within."""
    return OpenSession(
        reservation=reserved,
        generation=0,
        num_blocks=num_blocks,
        max_num_tokens=2048,
        max_num_reqs=64,
        max_blocks_per_req=max_blocks_per_req,
    )


def attach_request(opened: SessionOpened, geometry: SessionGeometry) -> AttachSession:
    """What a worker shows to open its data channel."""
    return AttachSession(opened.session, opened.attach_token, 0, geometry.digest(), 0)


class RawSession:
    """A reserved, opened and attached session.

    Args:
        address: The memory node.
        geometry: Layers of the session.
        num_blocks: Blocks of its pool.
        credentials: What to show the node.
        max_blocks_per_req: Longest block table that the session asks for.
        is_shared: Send frames through shared memory; the node is on a Unix socket.
    """

    def __init__(
        self,
        address: str,
        geometry: SessionGeometry,
        num_blocks: int,
        credentials: Credentials = NO_CREDENTIALS,
        max_blocks_per_req: int = 64,
        *,
        is_shared: bool = False,
    ) -> None:
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.control = ControlClient(address, TIMEOUT_S, credentials)
        kv_bytes = num_blocks * _block_bytes(geometry)
        reserved = self.control.reserve(reservation(geometry, kv_bytes))
        assert reserved.num_blocks == num_blocks
        self.reservation = reserved.reservation
        opened = self.control.open_session(
            session_of(self.reservation, num_blocks, max_blocks_per_req)
        )
        self._sock, _ = connect(address, TIMEOUT_S, credentials)
        attach = attach_request(opened, geometry)
        if is_shared:
            attach = msgspec.structs.replace(attach, offer=offer_channel(self._sock, 1))
        attached = call(self._sock, address, attach, Attached, TIMEOUT_S)
        self.transport = open_worker_channel(self._sock, attached, timeout_s=TIMEOUT_S)
        assert (self.transport.name == "shared memory") == is_shared
        self._step = 0

    def send(self, header: FrameHeader, payload: bytes | memoryview = b"") -> None:
        """Send any frame, with the byte count that the header claims."""
        self.transport.send(header, memoryview(payload))

    def send_raw(self, data: bytes) -> None:
        """Send bytes that need not be a frame."""
        self._sock.sendall(data)

    def end_sending(self) -> None:
        """Tell the node that nothing follows; what it says can still be read."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def send_step(self, step: StepMetadata, group: int = 0, flags: int = 0) -> None:
        """Send a STEP frame; that of group 0 comes first and has the next number."""
        self._step += group == 0
        payload = encode_step(step)
        header = FrameHeader(FrameKind.STEP, step=self._step, num_bytes=payload.nbytes)
        header.group, header.flags = group, flags
        self.send(header, payload)

    def layer_header(self, layer: int, qkv: torch.Tensor) -> FrameHeader:
        """Header of a LAYER frame of the last step."""
        return FrameHeader(
            FrameKind.LAYER,
            layer=layer,
            step=self._step,
            flags=FrameFlag.FUSED,
            num_bytes=qkv.nbytes,
        )

    def attend(
        self, layer: int, qkv: torch.Tensor, *, want_lse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Exchange a layer.

        Args:
            layer: Index in the geometry.
            qkv: ``[num_tokens, q + k + v]`` in the session's dtype.
            want_lse: Ask for the log-sum-exp, too.

        Returns:
            ``[num_tokens, num_query_heads, v_head_size]`` and ``[num_tokens,
            num_query_heads]`` float32.
        """
        header = self.layer_header(layer, qkv)
        header.flags |= FrameFlag.WANT_LSE if want_lse else FrameFlag.NONE
        self.send(header, as_bytes(qkv))
        return self.receive_out(layer, qkv.shape[0], want_lse=want_lse)

    def post_planar(
        self, layer: int, parts: tuple[torch.Tensor, ...], flags: int = 0
    ) -> None:
        """Send rows of q (if any), k and v (if stored), one behind the other."""
        payload = torch.cat([part.reshape(-1) for part in parts])
        header = self.layer_header(layer, payload)
        header.flags = flags
        self.send(header, as_bytes(payload))

    def receive_out(
        self, layer: int, num_rows: int, *, want_lse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and log-sum-exp of a layer that was sent."""
        kind, payload = self.receive()
        assert kind == FrameKind.OUT, payload
        heads = self.geometry.layers[layer].num_query_heads
        v_head_size = self.geometry.layers[layer].v_head_size
        dtype = getattr(torch, self.geometry.dtype)
        num_bytes = num_rows * heads * v_head_size * dtype.itemsize
        out = torch.frombuffer(bytearray(payload[:num_bytes]), dtype=dtype)
        lse = None
        if want_lse:
            rest = bytearray(payload[num_bytes:])
            lse = torch.frombuffer(rest, dtype=torch.float32).view(-1, heads)
        return out.view(num_rows, heads, v_head_size), lse

    def has_reply(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether the node begins to answer in time on its socket; reads nothing."""
        return bool(select.select([self._sock], [], [], timeout_s)[0])

    def receive(self) -> tuple[int, bytes]:
        """Kind and payload of the node's next frame."""
        header = FrameHeader()
        self.transport.receive_header(header, TIMEOUT_S)
        return header.kind, bytes(self.transport.receive_payload(header.num_bytes))

    def close(self) -> None:
        """End both channels."""
        self.transport.close()
        self.control.close()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous tensor."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def encode_step(step: StepMetadata) -> memoryview:
    """Payload of a STEP frame."""
    buffer = memoryview(bytearray(step.num_bytes))
    write_step(step, buffer)
    return buffer


def _block_bytes(geometry: SessionGeometry) -> int:
    """Bytes of a block in all storages, if none is padded."""
    item_bytes = {"float32": 4, "fp8_e4m3": 1}.get(geometry.block_dtype, 2)
    storages: dict[int, int] = {}
    for layer in geometry.layers:
        row = layer.num_kv_heads * (layer.head_size + layer.v_head_size)
        num_bytes = row * geometry.groups[layer.group].block_size * item_bytes
        storages[layer.storage] = max(num_bytes, storages.get(layer.storage, 0))
    return sum(storages.values())
