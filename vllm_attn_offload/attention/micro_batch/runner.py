# SPDX-License-Identifier: Apache-2.0
"""Runs a decode step as two micro-batches: one computes while the other is attended.

Lamina (arXiv 2405.01814) calls it staggered pipelining, section 4.3.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from vllm import forward_context
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, ForwardContext

from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.micro_batch.baton import Baton
from vllm_attn_offload.attention.micro_batch.choice import MicroBatchChoice
from vllm_attn_offload.attention.micro_batch.half_team import HalfTeam
from vllm_attn_offload.attention.micro_batch.lora import LoraRows
from vllm_attn_offload.attention.micro_batch.model_inputs import (
    Inputs,
    can_be_cut,
    joined,
    num_rows_of,
    rows_of,
)
from vllm_attn_offload.attention.micro_batch.split import (
    choose_cut,
    cut_batch,
    is_decode_step,
    shares_written,
)
from vllm_attn_offload.attention.readback import HostStep
from vllm_attn_offload.client.remote_attention import RemoteAttention

AttentionOffloadParts = tuple[AttentionOffloadMetadata, AttentionOffloadMetadata]


class MicroBatchRunner:
    """Stands before a model's ``forward`` and cuts the steps that gain from it.

    The model itself stays what it is, because vLLM asks it for its abilities. What
    is compiled lies inside ``forward`` and sees two smaller batches.

    Args:
        model: vLLM's model; its ``forward`` is wrapped until `uninstall`.
        choice: Decides per step.
        half_team: Of a worker that shares its CPUs with its node; None: has its own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        choice: MicroBatchChoice,
        half_team: HalfTeam | None = None,
    ) -> None:
        self._model = model
        self._half_team = half_team
        self._forward = model.forward
        self._choice = choice
        self._lora = LoraRows(model)
        self._nodes: RemoteAttention | None = None
        # New threads inherit the CPUs that vLLM bound the process to. With half of its
        # OpenMP threads the model's own thread computes neither part: libgomp would end
        # the others, and start them again for what follows.
        num_threads = half_team.num_threads if half_team else torch.get_num_threads()
        self._threads = ThreadPoolExecutor(
            2 if half_team else 1,
            "micro-batch",
            # vLLM replaces torch.set_num_threads by a warning.
            initializer=lambda: torch._C.set_num_threads(num_threads),
        )
        model.forward = self._run

    def connect(self, nodes: RemoteAttention | None) -> None:
        """Say which nodes attend from now on; without any, no step is cut."""
        self._nodes = nodes

    def uninstall(self) -> None:
        """Give the model its own ``forward`` back."""
        self._model.forward = self._forward
        if self._half_team is not None:
            self._half_team.uninstall()
        self._threads.shutdown()

    def times(self) -> dict[str, float]:
        """Sums of decode steps since the start, and what was decided."""
        return self._choice.times() | {
            "divides_cpus": float(self._half_team is not None)
        }

    def _run(self, *args: Any, **inputs: Any) -> Any:
        groups = None if args else _step_of(inputs)
        nodes = self._nodes
        if groups is None or nodes is None or not self._is_looked_at(groups):
            return self._forward(*args, **inputs)
        batches = [group.batch for group in groups]
        first = batches[0]
        sizes = first.num_reqs, first.num_tokens, int(first.seq_lens.sum())
        cut = None
        if self._choice.wants_cut(*sizes) and not any(
            shares_written(each.batch, each.block_size) for each in groups
        ):
            cut = choose_cut(batches, self._choice.costs)
        started, waited = time.perf_counter(), nodes.wait_s
        if cut is None:
            output = self._forward(**inputs)
        else:
            half_team = self._half_team
            with half_team.computing() if half_team else nullcontext():
                output = self._run_cut(inputs, groups, cut)
        step_s = time.perf_counter() - started
        # Also a step that lost a node, though it waited for nothing: another rank may
        # have lost none, and all of them count alike.
        self._choice.record(cut is not None, step_s, nodes.wait_s - waited)
        return output

    def _is_looked_at(self, groups: list[AttentionOffloadMetadata]) -> bool:
        """Return True if the step only decodes and its lengths need no wait."""
        if not (self._choice.may_cut or all(each.source.is_on_host for each in groups)):
            return False
        return all(is_decode_step(g.batch, g.decode_threshold) for g in groups)

    def _run_cut(
        self, inputs: Inputs, groups: list[AttentionOffloadMetadata], cut: int
    ) -> Any:
        whole = forward_context.get_forward_context()
        parts = [
            {id(group): part for group, part in zip(groups, of_groups, strict=True)}
            for of_groups in zip(*(_cut(group, cut) for group in groups), strict=True)
        ]
        num_tokens = groups[0].num_tokens
        rows = (slice(0, cut), slice(cut, num_tokens))
        contexts = list(map(_context_of, (whole, whole), parts, rows))
        adapters = self._lora.whole()
        cut_adapters = list(map(self._lora.of, rows))

        def enter(micro_batch: int) -> None:
            forward_context._forward_context = contexts[micro_batch]
            self._lora.use(cut_adapters[micro_batch])

        baton = Baton(enter)
        for of_part in parts:
            for group, part in zip(groups, of_part.values(), strict=True):
                part.baton = baton
                part.later = of_part.get(id(group.later))
                part.on_half = self._half_team is not None
        # Both compute on one stream: a thread starts with another one.
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        run = self._run_part
        later = self._threads.submit(run, baton, 1, rows_of(inputs, rows[1]), stream)
        try:
            first = (baton, 0, rows_of(inputs, rows[0]), stream)
            own = (
                self._threads.submit(run, *first).result()
                if self._half_team
                else run(*first)
            )
        finally:
            # Also where the first failed: the second must not outlive the step.
            error = later.exception()
            forward_context._forward_context = whole
            self._lora.use(adapters)
        if error is not None:
            raise error
        num_padding = num_rows_of(inputs) - num_tokens
        return joined([own, later.result()], num_padding)

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


def _step_of(inputs: Inputs) -> list[AttentionOffloadMetadata] | None:
    """The step's metadata by KV group, or None where what it needs cannot be cut.

    Without that of groups whose layers only draft: the step does not run them.
    """
    context = forward_context._forward_context
    if context is None or not isinstance(context.attn_metadata, dict):
        return None
    distinct = {
        id(each): each
        for each in context.attn_metadata.values()
        if not getattr(each, "is_drafter", False)
    }
    groups = [
        each for each in distinct.values() if isinstance(each, AttentionOffloadMetadata)
    ]
    if (
        not groups
        or len(groups) < len(distinct)
        or len({each.num_tokens for each in groups}) > 1
        or context.cudagraph_runtime_mode == CUDAGraphMode.FULL
        or context.dp_metadata is not None
        or not can_be_cut(inputs)
    ):
        return None
    return groups


def _cut(metadata: AttentionOffloadMetadata, cut: int) -> AttentionOffloadParts:
    first, second = (
        AttentionOffloadMetadata(
            HostStep(part),
            metadata.block_size,
            index,
            layer_name=metadata.layer_name,
            decode_threshold=metadata.decode_threshold,
        )
        for index, part in enumerate(cut_batch(metadata.batch, cut))
    )
    return first, second


def _context_of(
    whole: ForwardContext, parts: dict[int, AttentionOffloadMetadata], rows: slice
) -> ForwardContext:
    assert isinstance(whole.attn_metadata, dict)
    # Slots reach the nodes with the step; nothing on this side asks for them. All CUDA
    # graphs share one memory pool (`compilation/cuda_graph.py`): one half would
    # overwrite what the other still needs.
    return replace(
        whole,
        attn_metadata={
            name: parts[id(metadata)]
            for name, metadata in whole.attn_metadata.items()
            if id(metadata) in parts
        },
        slot_mapping={},
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        batch_descriptor=BatchDescriptor(rows.stop - rows.start),
        is_padding=None if whole.is_padding is None else whole.is_padding[rows],
        moe_layer_index=0,
    )
