# SPDX-License-Identifier: Apache-2.0
"""A step's lengths, slots and block rows on their way from the GPU, read back once."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_attn_offload.attention.cuda.streams import DeviceStreams, Mark
from vllm_attn_offload.protocol.step import Int32Array, StepMetadata

_INT32_PER_SLOT = 2


class CudaStep:
    """A step that the host may not have read yet.

    Args:
        query_start_loc: int32 ``[num_reqs + 1]`` on the device, for local prefills.
        max_query_len: Longest query of the step.
        starts: ``query_start_loc`` on the host.
        width: Columns of the block table that were read back.
        values: Host memory with slots (int64), lengths and block rows (int32).
        mark: When ``values`` is there; it stays so until the next step is begun.
    """

    def __init__(
        self,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        starts: Int32Array,
        width: int,
        values: torch.Tensor,
        mark: Mark,
    ) -> None:
        self.query_start_loc = query_start_loc
        self.max_query_len = max_query_len
        self.num_tokens = int(starts[-1])
        self._starts = starts
        self._width = width
        self._values = values
        self._mark = mark
        self._batch: StepMetadata | None = None

    @property
    def is_on_host(self) -> bool:
        """Return True if ``batch`` does not wait."""
        return self._batch is not None

    @property
    def batch(self) -> StepMetadata:
        """The step on the host; the first call waits for it."""
        if self._batch is None:
            self._mark.wait()
            num_reqs = self._starts.shape[0] - 1
            # A copy: the next step is read into the same memory.
            values = self._values.numpy().copy()
            num_slots = _INT32_PER_SLOT * self.num_tokens
            slots, rest = values[:num_slots], values[num_slots:]
            self._batch = StepMetadata.whole(
                query_start_loc=self._starts,
                seq_lens=rest[:num_reqs],
                slot_mapping=slots.view("int64"),
                block_table=rest[num_reqs:].reshape(num_reqs, self._width),
            )
        return self._batch


class CudaReadback:
    """Copies what memory nodes need to know of a step, in one piece.

    Args:
        streams: Of the device, for this object alone.
        block_size: Tokens of a block.
    """

    def __init__(self, streams: DeviceStreams, block_size: int) -> None:
        self._streams = streams
        self._block_size = block_size
        self._on_device = self._on_host = torch.empty(0, dtype=torch.int32)

    def begin(self, common: CommonAttentionMetadata) -> CudaStep:
        """Enqueue the copy; nothing waits for it here.

        Steps are begun one after another: what an earlier one was read into is lost.
        """
        num_reqs = common.num_reqs
        # A copy: vLLM prepares the next step in the same tensor.
        starts = common.query_start_loc_cpu[: num_reqs + 1].numpy().copy()
        num_tokens = int(starts[-1])
        width = max(1, -(-int(common.max_seq_len) // self._block_size))
        table = common.block_table_tensor[:num_reqs, :width]
        width = table.shape[1]
        slots = common.slot_mapping[:num_tokens].to(torch.int64).view(torch.int32)
        size = _INT32_PER_SLOT * num_tokens + num_reqs * (1 + width)
        self._reserve(size)
        target, values = self._on_device[:size], self._on_host[:size]
        parts = (slots, common.seq_lens[:num_reqs], table.flatten())
        self._streams.launch(lambda: torch.cat(parts, out=target))
        self._streams.fork()
        self._streams.copy(values, target)
        return CudaStep(
            common.query_start_loc[: num_reqs + 1],
            common.max_query_len,
            starts,
            width,
            values,
            self._streams.mark(),
        )

    def _reserve(self, size: int) -> None:
        if self._on_device.numel() < size:
            num_bytes = 2 * size * torch.int32.itemsize
            self._on_device = self._streams.device_buffer(num_bytes).view(torch.int32)
            self._on_host = self._streams.host_buffer(num_bytes).view(torch.int32)
