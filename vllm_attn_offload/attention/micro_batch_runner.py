# SPDX-License-Identifier: Apache-2.0
"""Runs a decode step as two micro-batches: one computes while the other is attended.

Lamina (arXiv 2405.01814) calls it staggered pipelining, section 4.3.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from vllm import forward_context
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import ForwardContext

from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.micro_batch_baton import Baton
from vllm_attn_offload.attention.micro_batch_choice import (
    MicroBatchChoice,
    NumMicroBatches,
)
from vllm_attn_offload.attention.micro_batch_split import choose_cut, cut_batch
from vllm_attn_offload.client.node_group import NodeGroup
from vllm_attn_offload.client.step_plan import BatchStep
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.logger import get_logger

logger = get_logger(__name__)

Inputs = dict[str, Any]

#: Inputs of a model that have a row per token, in their last dimension or the first.
_ROWS_LAST = frozenset({"positions"})
_ROWS_FIRST = frozenset({"input_ids", "inputs_embeds"})


class MicroBatchRunner:
    """Stands before a model's ``forward`` and cuts the steps that gain from it.

    The model itself stays what it is, because vLLM asks it for its abilities. What
    is compiled lies inside ``forward`` and sees two smaller batches.

    Args:
        model: vLLM's model; its ``forward`` is wrapped until `uninstall`.
        block_size: Tokens of a KV block.
        choice: Decides per step.
    """

    def __init__(
        self, model: torch.nn.Module, block_size: int, choice: MicroBatchChoice
    ) -> None:
        self._model = model
        self._forward = model.forward
        self._block_size = block_size
        self._choice = choice
        self._nodes: NodeGroup | None = None
        # Both threads compute with as many OpenMP threads; the new one inherits the
        # CPUs that vLLM bound the process to.
        num_threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(
            1,
            "micro-batch",
            # vLLM replaces torch.set_num_threads by a warning.
            initializer=lambda: torch._C.set_num_threads(num_threads),
        )
        model.forward = self._run

    def connect(self, nodes: NodeGroup) -> None:
        """Say which nodes attend from now on."""
        self._nodes = nodes

    def uninstall(self) -> None:
        """Give the model its own ``forward`` back."""
        self._model.forward = self._forward
        self._thread.shutdown()

    def times(self) -> dict[str, float]:
        """Sums of decode steps since the start, and what was decided."""
        return self._choice.times()

    def _run(self, *args: Any, **inputs: Any) -> Any:
        metadata = None if args else _step_of(inputs)
        nodes = self._nodes
        if metadata is None or nodes is None or not self._is_looked_at(metadata):
            return self._forward(*args, **inputs)
        batch = metadata.batch
        num_rows, num_tokens = batch.num_tokens, int(batch.seq_lens.sum())
        cut = None
        if self._choice.wants_cut(num_rows, num_tokens):
            cut = choose_cut(batch, self._block_size, self._choice.costs)
        started, waited = time.perf_counter(), nodes.wait_s
        output = (
            self._forward(**inputs)
            if cut is None
            else self._run_cut(inputs, metadata, cut)
        )
        step_s = time.perf_counter() - started
        # A step that lost a node waited for nothing.
        if nodes.loss is None:
            self._choice.record(cut is not None, step_s, nodes.wait_s - waited)
        return output

    def _is_looked_at(self, metadata: AttentionOffloadMetadata) -> bool:
        """Whether the step decodes only, and its lengths cost no wait for a GPU."""
        if not (self._choice.may_cut or isinstance(metadata.source, BatchStep)):
            return False
        return metadata.batch.seq_lens.shape[0] == metadata.num_tokens

    def _run_cut(
        self, inputs: Inputs, metadata: AttentionOffloadMetadata, cut: int
    ) -> Any:
        whole = forward_context.get_forward_context()
        parts = [
            AttentionOffloadMetadata(part, index)
            for index, part in enumerate(cut_batch(metadata.batch, cut))
        ]
        rows = (slice(0, cut), slice(cut, None))
        first, second = map(_context_of, (whole, whole), parts, rows)
        baton = Baton((first, second))
        for part in parts:
            part.baton = baton
        # Both compute on one stream: a thread starts with another one.
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        later = self._thread.submit(
            self._run_part, baton, 1, _rows_of(inputs, rows[1]), stream
        )
        try:
            own = _rows_of(inputs, rows[0])
            outputs = [self._run_part(baton, 0, own, stream)]
        finally:
            # Also where the first failed: the second must not outlive the step.
            error = later.exception()
            forward_context._forward_context = whole
        if error is not None:
            raise error
        return _joined([*outputs, later.result()])

    def _run_part(
        self,
        baton: Baton,
        micro_batch: int,
        inputs: Inputs,
        stream: torch.cuda.Stream | None,
    ) -> Any:
        baton.take(micro_batch)
        try:
            # Inference mode belongs to a thread.
            with torch.inference_mode(), torch.cuda.stream(stream):
                return self._forward(**inputs)
        finally:
            baton.finish(micro_batch)


def wrap_model(model: torch.nn.Module, vllm_config: VllmConfig) -> MicroBatchRunner:
    """Let a worker's decode steps run in micro-batches, where its options ask for it.

    Raises:
        ValueError: Two micro-batches were asked for, and they cannot be had.
    """
    option = AttentionOffloadConfig.of_engine(vllm_config).num_microbatches
    refusal = _refusal(vllm_config, option)
    if refusal is not None and option == 2:
        raise ValueError(
            f"num_microbatches=2 was given, but {refusal}. Allowed: 1 or auto. Drop "
            "num_microbatches."
        )
    if refusal is not None and option == "auto":
        logger.info("Decode steps are not cut into micro-batches: %s.", refusal)
        option = 1
    block_size = vllm_config.cache_config.block_size
    return MicroBatchRunner(model, block_size, MicroBatchChoice(option))


def _refusal(vllm_config: VllmConfig, option: NumMicroBatches) -> str | None:
    if vllm_config.lora_config is not None:
        return "LoRA assigns adapters to the rows of whole steps"
    if option == "auto" and vllm_config.device_config.device_type != "cpu":
        return "the host cannot time a GPU's steps"
    if option == "auto" and vllm_config.parallel_config.tensor_parallel_size > 1:
        return "ranks could measure different times, but must run alike"
    return None


def _step_of(inputs: Inputs) -> AttentionOffloadMetadata | None:
    """The step's metadata, or None where what it needs cannot be cut."""
    context = forward_context._forward_context
    if context is None or not isinstance(context.attn_metadata, dict):
        return None
    metadata = next(iter(context.attn_metadata.values()), None)
    if (
        not isinstance(metadata, AttentionOffloadMetadata)
        or any(other is not metadata for other in context.attn_metadata.values())
        or context.cudagraph_runtime_mode != CUDAGraphMode.NONE
        or context.dp_metadata is not None
    ):
        return None
    for name, value in inputs.items():
        if value is None:
            continue
        if name in _ROWS_LAST:
            num_rows = value.shape[-1]
        elif name in _ROWS_FIRST:
            num_rows = value.shape[0]
        else:
            return None
        if num_rows != metadata.num_tokens:
            return None
    return metadata


def _context_of(
    whole: ForwardContext, metadata: AttentionOffloadMetadata, rows: slice
) -> ForwardContext:
    assert isinstance(whole.attn_metadata, dict)
    # Slots reach the nodes with the step; nothing on this side asks for them.
    return replace(
        whole,
        attn_metadata=dict.fromkeys(whole.attn_metadata, metadata),
        slot_mapping={},
        is_padding=None if whole.is_padding is None else whole.is_padding[rows],
        moe_layer_index=0,
    )


def _rows_of(inputs: Inputs, rows: slice) -> Inputs:
    return {
        name: None
        if value is None
        else value[..., rows]
        if name in _ROWS_LAST
        else value[rows]
        for name, value in inputs.items()
    }


def _joined(outputs: list[Any]) -> Any:
    """Rows of both micro-batches in the order of the batch, also of nested tensors."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    return type(first)([_joined(list(parts)) for parts in zip(*outputs, strict=True)])
