# SPDX-License-Identifier: Apache-2.0
"""The executor starts or joins memory nodes, sizes the KV pool, recovers from loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, cast

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from vllm_attn_offload.client.attachment import Attachment, NodeFailure
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.compatibility import check_supported
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.args import (
    choose_scheduler,
    data_parallel_size,
    environment_of_one_engine,
)
from vllm_attn_offload.engine.engine_identity import EngineIdentity
from vllm_attn_offload.engine.engine_report import EngineReport
from vllm_attn_offload.engine.frontend import end_with_frontend
from vllm_attn_offload.engine.kv_cache_plan import (
    block_bytes,
    check_groups,
    plan_kv_cache,
)
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.engine.outage_board import OutageBoard
from vllm_attn_offload.engine.outage_notice import Outage, OutageNotice
from vllm_attn_offload.engine.placement import local_nodes
from vllm_attn_offload.engine.pool_size import check_pool_size
from vllm_attn_offload.engine.rank_calls import RankCalls
from vllm_attn_offload.engine.recovery import Recovery
from vllm_attn_offload.engine.resident_state_manager import register_resident_states
from vllm_attn_offload.engine.session_limits import SessionLimits
from vllm_attn_offload.engine.start_failure import tells_why
from vllm_attn_offload.engine.state_pool import StatePool, shared_groups
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.worker.failure_note import FailureNote
from vllm_attn_offload.worker.lost_step import LossReader, LostStep

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.executor.abstract import FailureCallback
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    # A mixin over any executor; typed as the one that is used.
    _ExecutorBase = MultiprocExecutor
else:
    _ExecutorBase = object

logger = get_logger(__name__)

#: Bytes with which vLLM groups the layers before the pool's size is known.
_MORE_THAN_ANY_POOL = 1 << 60


class AttentionOffloadExecutorMixin(_ExecutorBase):
    """Adds memory nodes to an executor of vLLM.

    Raises:
        ValueError: The configuration has a feature that offloading does not support.
        MemoryNodeError: A memory node cannot be started, reached or used.
        RankSilentError: A rank does not answer; its host may be lost.
    """

    failure_note: FailureNote | None = None

    @tells_why
    @environment_of_one_engine()
    def _init_executor(self) -> None:
        check_supported(self.vllm_config)
        end_with_frontend()
        self.failure_note = FailureNote()
        config = AttentionOffloadConfig.of_engine(self.vllm_config)
        self._on_failure: FailureCallback | None = None
        self._planned: list[KVCacheConfig] = []
        self._states = StatePool(
            self.vllm_config, lambda: self.collective_rpc("free_device_bytes")
        )
        register_resident_states(self.vllm_config)
        self._prepare_cluster()
        self._pool = NodePool(
            config,
            EngineIdentity.of(self.vllm_config),
            local_nodes(self.vllm_config, config),
            ControlClient,
        )
        self._ranks = RankCalls(self.collective_rpc, config)
        self._report = EngineReport.of_engine(self.vllm_config)
        self._recovery = self._new_recovery(config)
        try:
            with self._report.span("join", {"nodes": config.addresses}):
                self._pool.join()
            super()._init_executor()
            self._ranks.check_options()
        except BaseException:
            self._leave_memory_nodes()
            raise

    def _prepare_cluster(self) -> None:
        """Claim what the workers need, before memory nodes take it."""

    @tells_why
    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        """Return every rank's layers; recurrent states get a pool of their own.

        Raises:
            ValueError: The compute node has no memory for the states.
        """
        return self._states.place(super().get_kv_cache_specs())

    @tells_why
    def determine_available_memory(self) -> list[int]:
        """Reserve the pool on the memory nodes and report it as KV memory.

        Returns:
            Bytes per rank, in vLLM's own bytes per block.

        Raises:
            ValueError: The pool holds no request of max_model_len.
        """
        super().determine_available_memory()
        specs = self.get_kv_cache_specs()
        self._planned = plan_kv_cache(
            self.vllm_config, specs, [_MORE_THAN_ANY_POOL] * len(specs)
        )
        geometries: list[SessionGeometry] = self.collective_rpc(
            "session_geometry", args=(self._planned,)
        )
        with self._report.span("reserve", {"ranks": len(geometries)}):
            num_blocks = self._pool.reserve(
                geometries, data_parallel_size(self.vllm_config)
            )
        check_pool_size(
            self.vllm_config,
            shared_groups(self._planned[0]),
            min(num_blocks),
            self._pool.nodes,
            self._pool.partition,
        )
        return [
            count * block_bytes(planned)
            for count, planned in zip(num_blocks, self._planned, strict=True)
        ]

    @tells_why
    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Open the sessions, allocate the stubs, connect the data channels.

        Raises:
            MemoryNodeError: A node is gone or refuses a session.
            RuntimeError: vLLM grouped the layers in another way than before.
        """
        for planned, given in zip(self._planned, kv_cache_configs, strict=True):
            check_groups(planned, given)
        block_size = self.cache_config.block_size
        max_blocks = -(-self.model_config.max_model_len // block_size) + 1
        with self._report.span("open", {"blocks": kv_cache_configs[0].num_blocks}):
            attachments = self._pool.open_sessions(
                [kv_cache_config.num_blocks for kv_cache_config in kv_cache_configs],
                SessionLimits(
                    self.scheduler_config.max_num_batched_tokens,
                    self._max_num_reqs(),
                    max_blocks,
                ),
            )
        super().initialize_from_config(kv_cache_configs)
        for problem in filter(None, self._attach(attachments)):
            raise MemoryNodeError(*problem)
        self._report.open_pool(min(each.num_blocks for each in kv_cache_configs))
        if self._recovery is None:
            self._pool.watch(self._give_up)
        else:
            self._pool.watch(self._recovery.report_loss)
            reader = LossReader(self._report_lost_step)
            self.kv_output_aggregator = cast("KVOutputAggregator", reader)

    def sample_tokens(  # type: ignore[override]
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """Sample, unless the step is lost: random generators must not advance then.

        With asynchronous scheduling the loss of a step is not known yet: its tokens are
        sampled, and the scheduler drops them.
        """
        if self._recovery is None or non_block or not self._recovery.is_pending:
            return super().sample_tokens(grammar_output, non_block)
        self._ranks.discard_step(self._recovery.remaining_s())
        return EMPTY_MODEL_RUNNER_OUTPUT

    def register_failure_callback(self, callback: FailureCallback) -> None:
        """Also call it when a memory node is lost for good."""
        self._on_failure = callback
        super().register_failure_callback(callback)

    def check_health(self) -> None:
        """Raise if a worker or a memory node does not answer."""
        super().check_health()
        self._pool.check_health()

    def shutdown(self) -> None:
        """Leave the memory nodes and stop the workers; no step is in flight."""
        if self._recovery is not None:
            self._recovery.close()
        # Nodes and workers stop together: the engine has few seconds for both.
        self._pool.request_stop()
        super().shutdown()
        if self.failure_note is not None:
            self.failure_note.close()
            self.failure_note = None
        self._leave_memory_nodes()

    def _max_num_reqs(self) -> int:
        """Most requests of a STEP; those of chunked local attention are cut."""
        scheduler, chunk = self.scheduler_config, self.model_config.attention_chunk_size
        if not chunk:
            return scheduler.max_num_seqs
        num_tokens = scheduler.max_num_batched_tokens
        return min(2 * scheduler.max_num_seqs + num_tokens // chunk, num_tokens)

    def _new_recovery(self, config: AttentionOffloadConfig) -> Recovery | None:
        if config.on_node_loss != "recover":
            return None
        # Before the scheduler is made, from the same configuration.
        choose_scheduler(self.vllm_config, config.recovery_timeout_s)
        notice = OutageNotice(
            self._publish_outage(),
            config.recovery_timeout_s,
            config.unavailable_grace_s,
        )
        recovery = Recovery(
            *(self._pool, self._attach, config.recovery_timeout_s, self._give_up),
            *(notice, self._report),
        )
        recovery.register(self.vllm_config)
        return recovery

    def _publish_outage(self) -> Callable[[Outage | None], None]:
        board = OutageBoard.find()
        if board is None:  # No frontend of ours configured this engine.
            return lambda outage: None
        publish = functools.partial(
            board.write, self.parallel_config.data_parallel_index
        )
        publish(None)
        return publish

    def _attach(self, attachments: list[list[Attachment]]) -> list[NodeFailure | None]:
        recovery = self._recovery
        within_s = recovery.remaining_s() if recovery and recovery.is_pending else None
        return self._ranks.attach(attachments, self._pool.partition, within_s)

    def _report_lost_step(self, step: LostStep) -> None:
        assert self._recovery is not None
        self._recovery.report_loss(step.error, step.generation)

    def _give_up(self, error: MemoryNodeError) -> None:
        logger.error(
            "%s The engine stops, because its KV cache is lost; see the log of "
            "'vllm-memory-node' and start the server again.",
            error,
        )
        self.is_failed = True
        if self._on_failure is not None:
            self._on_failure()

    def _leave_memory_nodes(self) -> None:
        self._pool.request_stop()
        self._pool.close()


class AttentionOffloadExecutor(AttentionOffloadExecutorMixin, MultiprocExecutor):
    """vLLM's multi-process executor with its KV cache on memory nodes."""

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Allow it: a worker's data channel keeps its steps in order."""
        return True
