# SPDX-License-Identifier: Apache-2.0
"""The executor: starts or joins memory nodes, sizes the KV pool, watches health."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

from vllm.utils.mem_utils import format_gib
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_attn_offload.client.attachment import Attachment
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine_config import run_dir
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.frontend_watch import end_with_frontend
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.memory_node.capacity import GIB
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
from vllm_attn_offload.placement import share_cpus
from vllm_attn_offload.protocol import (
    CapacityReserved,
    OpenSession,
    ReserveCapacity,
    SessionGeometry,
    Shard,
)
from vllm_attn_offload.support import check_supported

if TYPE_CHECKING:
    from vllm.v1.executor.abstract import FailureCallback
    from vllm.v1.kv_cache_interface import KVCacheConfig

    # A mixin over any executor; typed as the one that is used.
    _ExecutorBase = MultiprocExecutor
else:
    _ExecutorBase = object

logger = get_logger(__name__)


class AttentionOffloadExecutorMixin(_ExecutorBase):
    """Adds memory nodes to an executor of vLLM.

    Raises:
        ValueError: The configuration has a feature that offloading does not support.
        MemoryNodeError: A memory node cannot be started, reached or used.
    """

    def _init_executor(self) -> None:
        check_supported(self.vllm_config)
        end_with_frontend()
        self._offload_config = AttentionOffloadConfig.of_engine(self.vllm_config)
        self._engine_name = f"{self.vllm_config.instance_id or uuid.uuid4().hex[:8]}"
        self._process: MemoryNodeProcess | None = None
        self._control: ControlClient | None = None
        self._reserved: list[CapacityReserved] = []
        self._on_failure: FailureCallback | None = None
        self._is_closing = False
        try:
            self._control = self._join_memory_node()
            super()._init_executor()
        except BaseException:
            self._leave_memory_node()
            raise
        threading.Thread(
            target=self._watch_memory_node, name="MemoryNodeMonitor", daemon=True
        ).start()

    def determine_available_memory(self) -> list[int]:
        """Reserve the pool on the memory nodes and report it as KV memory.

        Returns:
            Bytes per rank, in vLLM's own bytes per block.
        """
        super().determine_available_memory()
        assert self._control is not None
        geometries: list[SessionGeometry] = self.collective_rpc("session_geometry")
        block_bytes = [
            sum(spec.page_size_bytes for spec in specs.values())
            for specs in self.get_kv_cache_specs()
        ]
        self._reserved = [
            self._control.reserve(
                ReserveCapacity(
                    engine=self._engine_name,
                    shard=Shard(tp_rank=rank, tp_size=len(geometries)),
                    geometry=geometry,
                    kv_bytes=self._kv_bytes_per_rank(len(geometries), rank),
                )
            )
            for rank, geometry in enumerate(geometries)
        ]
        held = sum(reserved.kv_bytes for reserved in self._reserved)
        logger.info(
            "Attention offload: memory node %s (%s, %s kernel) holds %s GiB of KV "
            "cache, %s blocks; limits of the compute host do not apply",
            self._control.address,
            self._control.info.device,
            self._control.info.attention_kernel,
            format_gib(held),
            f"{min(reserved.num_blocks for reserved in self._reserved):,}",
        )
        return [
            reserved.num_blocks * num_bytes
            for reserved, num_bytes in zip(self._reserved, block_bytes, strict=True)
        ]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Open the sessions, allocate the stubs, connect the data channels."""
        assert self._control is not None
        attachments = [
            [self._open_session(self._control, reserved, kv_cache_config)]
            for reserved, kv_cache_config in zip(
                self._reserved, kv_cache_configs, strict=True
            )
        ]
        super().initialize_from_config(kv_cache_configs)
        # Addresses are known at run time only: they never enter the configuration,
        # which is hashed into the compile cache's key.
        self.collective_rpc("attach_memory_nodes", args=(attachments,))

    def register_failure_callback(self, callback: FailureCallback) -> None:
        """Tell the engine also when a memory node is lost."""
        self._on_failure = callback
        super().register_failure_callback(callback)

    def check_health(self) -> None:
        """Raise where a worker or a memory node does not answer."""
        super().check_health()
        if self._control is not None:
            self._control.refresh_info()

    def shutdown(self) -> None:
        """Let go of the memory nodes and stop the workers; no step is in flight."""
        self._is_closing = True
        if self._process is not None:
            # Ends while the workers do: the engine has few seconds for both.
            self._process.request_stop()
        super().shutdown()
        self._leave_memory_node()

    def _join_memory_node(self) -> ControlClient:
        config = self._offload_config
        if config.memory_nodes:
            (address,) = config.memory_nodes
        else:
            self._process = MemoryNodeProcess(
                run_dir(self.parallel_config.data_parallel_rank),
                kv_cache_gib=config.kv_cache_gib,
                cpus=config.local_node_cpus or share_cpus(self.vllm_config),
                startup_timeout_s=config.startup_timeout_s,
            )
            address = self._process.address
            logger.info(
                "Attention offload: started a memory node on this host's CPU (pid %d), "
                "because memory_nodes names none",
                self._process.pid,
            )
        return ControlClient(address, config.startup_timeout_s)

    def _leave_memory_node(self) -> None:
        self._is_closing = True
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.stop()

    def _kv_bytes_per_rank(self, num_ranks: int, rank: int) -> int:
        """An equal share: of kv_cache_gib, or of what is free."""
        assert self._control is not None
        if self._offload_config.kv_cache_gib is not None:
            return int(self._offload_config.kv_cache_gib * GIB) // num_ranks
        return self._control.refresh_info().kv_bytes_free // (num_ranks - rank)

    def _open_session(
        self,
        control: ControlClient,
        reserved: CapacityReserved,
        kv_cache_config: KVCacheConfig,
    ) -> Attachment:
        scheduler = self.scheduler_config
        block_size = self.cache_config.block_size
        opened = control.open_session(
            OpenSession(
                reservation=reserved.reservation,
                generation=0,
                num_blocks=kv_cache_config.num_blocks,
                max_num_tokens=scheduler.max_num_batched_tokens,
                max_num_reqs=scheduler.max_num_seqs,
                max_blocks_per_req=-(-self.model_config.max_model_len // block_size)
                + 1,
            )
        )
        return Attachment(control.address, opened.session, opened.attach_token, 0)

    def _watch_memory_node(self) -> None:
        control = self._control
        assert control is not None
        control.wait_until_lost()
        if self._is_closing:
            return
        logger.error(
            "%s",
            MemoryNodeError(
                control.address,
                "it was lost, and its KV cache with it. The engine stops; see the log "
                "of 'vllm-memory-node' and start the server again.",
            ),
        )
        self.is_failed = True
        if self._on_failure is not None:
            self._on_failure()


class AttentionOffloadExecutor(AttentionOffloadExecutorMixin, MultiprocExecutor):
    """vLLM's multi-process executor with its KV cache on memory nodes."""

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Steps of one worker are ordered by its data channel."""
        return True
