# SPDX-License-Identifier: Apache-2.0
"""Base of offloading workers: no KV cache, but a session on every memory node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.attention.layer_exchange import LayerExchange
from vllm_attn_offload.attention.layers import (
    attention_layers,
    layer_problems,
    mark_drafter_layers,
)
from vllm_attn_offload.attention.micro_batch.runner import MicroBatchRunner
from vllm_attn_offload.attention.micro_batch.wrap_model import wrap_model
from vllm_attn_offload.client.attachment import Attachment, NodeFailure
from vllm_attn_offload.client.connect import connect_nodes
from vllm_attn_offload.client.partition import PartitionKind
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.compatibility import check_layers
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.geometry import (
    SessionGeometry,
)
from vllm_attn_offload.transport.cuda_memory import SharedDevice
from vllm_attn_offload.worker.draft_groups import check_draft_groups
from vllm_attn_offload.worker.failure_note import noted_failure
from vllm_attn_offload.worker.geometry import session_geometry
from vllm_attn_offload.worker.local_kv_cache import LocalKVCacheConfig
from vllm_attn_offload.worker.lost_step import LostStep
from vllm_attn_offload.worker.step_sampler import StepSampler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu_worker import Worker as _WorkerBase
    from vllm.v1.worker.worker_base import CompilationTimes
else:
    _WorkerBase = object

#: A KV cache size in bytes that is given so that vLLM asks for none. Large, because
#: vLLM takes what its frontends decode images and videos in from it.
UNUSED_KV_CACHE_BYTES: Final = 1 << 50


class AttentionOffloadWorker(_WorkerBase):
    """Mixin over vLLM's workers: attention leaves, its KV cache never comes."""

    vllm_config: VllmConfig
    # Until nodes are attached; a mixin has no constructor of its own.
    _nodes: RemoteAttention | None = None
    _exchange: LayerExchange | None = None
    _micro_batches: MicroBatchRunner | None = None
    _sampler: StepSampler | None = None
    _generation = 0
    _geometry: SessionGeometry
    _local_kv_cache: LocalKVCacheConfig

    @noted_failure()
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with offloaded attention layers.

        Raises:
            ValueError: The model has attention that cannot be offloaded.
        """
        self._register_backend()
        super().load_model(*args, **kwargs)
        check_layers(layer_problems(self.vllm_config))
        mark_drafter_layers(self.vllm_config, self.model_runner.get_model())
        self._sampler = StepSampler.of_worker(self.vllm_config, self.rank)

    @noted_failure()
    def session_geometry(self, planned: list[KVCacheConfig]) -> SessionGeometry:
        """Shapes of this worker's attention layers, in the order of their index.

        Args:
            planned: How vLLM groups the layers of each rank.

        Raises:
            ValueError: Layers of a draft model are not in the first KV group.
        """
        check_draft_groups(self.vllm_config, planned[self.rank])
        self._geometry = session_geometry(self.vllm_config, planned[self.rank])
        return self._geometry

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate a one-block stub for the nodes' pool, and all recurrent states."""
        self._local_kv_cache = LocalKVCacheConfig.of(kv_cache_config)
        super().initialize_from_config(self._local_kv_cache)
        self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        self.model_runner.kv_cache_config.num_blocks = kv_cache_config.num_blocks

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile, capture and warm up; attention returns zeros meanwhile."""
        # Dummy steps of the second model runner look real but are not, and graphs are
        # captured of whole steps.
        self._connect_layers(None)
        config = self.model_runner.kv_cache_config
        num_blocks = config.num_blocks
        # Dummy requests take one id after another for all KV groups, and layers with
        # states, whose pools are smaller, write there.
        config.num_blocks = self._local_kv_cache.smallest_pool(num_blocks)
        try:
            return super().compile_or_warm_up_model()
        finally:
            config.num_blocks = num_blocks
            self._connect_layers(self._nodes)

    def attach_memory_nodes(
        self, attachments: list[list[Attachment]], kind: PartitionKind
    ) -> NodeFailure | None:
        """Open the data channels of this rank and hand them to its layers.

        Channels of an older generation are closed and never used again.

        Args:
            attachments: Per rank, one per memory node.
            kind: What is divided between the nodes.

        Returns:
            The node that is gone or refuses the session, and why. An exception would
            leave replies of other ranks unread.
        """
        if self._nodes is not None:
            self._nodes.close()
        config = AttentionOffloadConfig.of_engine(self.vllm_config)
        try:
            self._nodes = connect_nodes(
                attachments[self.rank],
                kind,
                self._geometry,
                timeout_s=config.request_timeout_s,
                credentials=config.credentials,
                tolerate_loss=config.on_node_loss == "recover",
                worker_kv_bytes=self.kv_stub_bytes(),
                worker_state_bytes=self.resident_state_bytes(),
                device=self._shared_device(),
            )
        except MemoryNodeError as error:
            return NodeFailure(error.node, error.cause)
        self._generation = attachments[self.rank][0].generation
        if self._micro_batches is None:
            self._micro_batches = wrap_model(self.model_runner.model, self.vllm_config)
        self._connect_layers(self._nodes)
        return None

    def offload_options(self) -> dict[str, Any]:
        """Options that this rank's host was started with, by name, without files."""
        return AttentionOffloadConfig.of_engine(self.vllm_config).without_files()

    def kv_stub_bytes(self) -> int:
        """Bytes of attention's KV cache that this worker allocated itself."""
        storages = [
            layer.kv_cache.untyped_storage()
            for layer in attention_layers(self.vllm_config).values()
        ]
        by_address = {storage.data_ptr(): storage.nbytes() for storage in storages}
        # Recurrent states are in the same piece.
        return sum(by_address.values()) - self.resident_state_bytes()

    def resident_state_bytes(self) -> int:
        """Bytes of recurrent states, of layers that do not attend."""
        return self._local_kv_cache.state_bytes

    def exchange_times(self) -> dict[str, float]:
        """Sums of the worker's time in pack, send and wait since it was attached."""
        assert self._nodes is not None
        assert self._micro_batches is not None
        return self._nodes.times() | self._micro_batches.times()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run a step.

        Raises:
            RuntimeError: The scheduler asks for work on KV blocks that are not here.
        """
        # vLLM asks for it where states share their memory with KV blocks. Here they do
        # not, and a memory node reads no token that was not stored.
        scheduler_output.new_block_ids_to_zero = None
        if scheduler_output.kv_cache_block_copies:
            raise RuntimeError(
                "Attention offloading does not support copying KV blocks, which the "
                "scheduler asks for to match parts of a state's block. Allowed: whole "
                "blocks. Drop prefix_match_unit, or run without --attention-offload."
            )
        if self._sampler is None:
            return self._with_loss(super().execute_model(scheduler_output))
        with self._sampler.around(self._nodes, scheduler_output):
            return self._with_loss(super().execute_model(scheduler_output))

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Sample the step's tokens, and draft those that may follow."""
        # A loss that only a drafter meets leaves the sampled tokens right.
        was_whole = self._nodes is None or self._nodes.loss is None
        output = super().sample_tokens(grammar_output)
        return self._with_loss(output, is_whole=was_whole)

    def discard_step(self) -> None:
        """Forget a step that was executed, so that nothing is sampled from it."""
        self.model_runner.execute_model_state = None

    def shutdown(self) -> None:
        """Close the data channels, then shut the worker down."""
        if self._nodes is not None:
            self._nodes.close()
        super().shutdown()
        if self._exchange is not None:
            self._exchange.close()

    def _shared_device(self) -> SharedDevice | None:
        """Return the layers' device, where nodes can share memory with it."""
        return None

    def _connect_layers(self, nodes: RemoteAttention | None) -> None:
        """Hand the nodes to layers and micro-batches; None takes them away."""
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = None if nodes is None else self._make_exchange(nodes)
        for index, layer in enumerate(attention_layers(self.vllm_config).values()):
            shape = self._geometry.layers[index]
            cast(AttentionOffloadImpl, layer.impl).connect(
                self._exchange, index, shape.k_scale, shape.v_scale
            )
        if self._micro_batches is not None:
            self._micro_batches.connect(nodes)

    def _make_exchange(self, nodes: RemoteAttention) -> LayerExchange:
        """Return what moves layers between this worker's device and the nodes."""
        raise NotImplementedError

    def _with_loss(self, output: Any, *, is_whole: bool = False) -> Any:
        # A dummy step, during which layers are not connected, loses nothing.
        if self._nodes is None or self._exchange is None:
            return output
        loss = self._nodes.loss
        if loss is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        return LostStep(output, self._generation, loss, is_whole)

    def _register_backend(self) -> None:
        """Make vLLM's selector return the offloading backend in this process."""
        raise NotImplementedError
