# SPDX-License-Identifier: Apache-2.0
"""All memory nodes of an engine: join, reserve, open, watch and restore them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vllm_attn_offload.client.attachment import Attachment
from vllm_attn_offload.client.partition import (
    PartitionKind,
    choose_partition,
    divide_blocks,
    pool_blocks,
    shard_geometry,
)
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.engine_identity import EngineIdentity
from vllm_attn_offload.engine.join_progress import join_all
from vllm_attn_offload.engine.node_handle import Connect, NodeHandle
from vllm_attn_offload.engine.node_launch import Launch
from vllm_attn_offload.engine.session_limits import SessionLimits
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.messages import GIB, Shard

logger = get_logger(__name__)

#: A node that is back answers at once.
_REJOIN_TIMEOUT_S = 5.0


class NodePool:
    """The KV pool of one engine, spread over its memory nodes.

    Args:
        config: The engine's options.
        engine: What the nodes are told about it.
        launches: Start or find one node each, if the options name no addresses.
        connect: Opens control channels.
    """

    def __init__(
        self,
        config: AttentionOffloadConfig,
        engine: EngineIdentity,
        launches: Sequence[Launch],
        connect: Connect,
    ) -> None:
        self.generation = 0
        self.partition: PartitionKind = "heads"
        self._config = config
        self._engine = engine
        self._connect = connect
        self._standby = list(config.standby_nodes)
        self._nodes = [self._node(each) for each in config.addresses or launches]
        self._on_loss: Callable[[MemoryNodeError], None] | None = None
        self._limits: SessionLimits | None = None
        self._is_closed = False

    @property
    def nodes(self) -> Sequence[NodeHandle]:
        """The nodes that hold the pool."""
        return self._nodes

    def join(self) -> None:
        """Start or connect to all nodes at once.

        Raises:
            MemoryNodeError: One of them cannot be started or reached.
        """
        self._warn_of_open_nodes()
        join_all(self._nodes, self._config.startup_timeout_s)
        for node in self._nodes:
            if node.pid is not None:
                logger.info(
                    "Attention offload: started a memory node on this host's %s "
                    "(pid %d), because memory_nodes names none",
                    node.info.device,
                    node.pid,
                )

    def _warn_of_open_nodes(self) -> None:
        if nodes := self._config.open_nodes:
            logger.warning(
                "Attention offload: no token is set for %s, so whoever reaches them "
                "can use them, and take their memory. Start them with "
                "--auth-token-file and set auth_token_file.",
                ", ".join(nodes),
            )

    def reserve(self, geometries: list[SessionGeometry], num_engines: int) -> list[int]:
        """Reserve memory on every node for every worker.

        Args:
            geometries: The layers of each rank.
            num_engines: Engines that share the free memory.

        Returns:
            Per rank, the size of its pool in blocks.

        Raises:
            ValueError: The partition of the options does not fit the layers.
            MemoryNodeError: A node refuses or is lost.
        """
        num_nodes, num_ranks = len(self._nodes), len(geometries)
        self.partition, reason = choose_partition(
            self._config.partition, geometries[0], num_nodes
        )
        for index, node in enumerate(self._nodes):
            kv_bytes = max(1, self._kv_bytes(node, num_engines) // num_ranks)
            node.reserve(
                self._engine.request(
                    Shard(rank, num_ranks, index, num_nodes),
                    shard_geometry(each, self.partition, index, num_nodes),
                    kv_bytes,
                )
                for rank, each in enumerate(geometries)
            )
        self._log_capacity(reason)
        return [pool_blocks(self.partition, held) for held in self._blocks_by_rank()]

    def open_sessions(
        self, num_blocks: list[int], limits: SessionLimits
    ) -> list[list[Attachment]]:
        """Turn all reservations into pools.

        Args:
            num_blocks: Blocks that the scheduler uses, per rank.
            limits: Size of the largest step.

        Returns:
            Per rank, one attachment per node.

        Raises:
            MemoryNodeError: A node refuses or is lost.
        """
        self._limits = limits
        by_rank = [
            divide_blocks(count, held, self.partition)
            for count, held in zip(num_blocks, self._blocks_by_rank(), strict=True)
        ]
        for node, counts in zip(self._nodes, zip(*by_rank, strict=True), strict=True):
            node.limit_blocks(counts)
        return self._open()

    def watch(self, on_loss: Callable[[MemoryNodeError], None]) -> None:
        """Report every node that is lost from now on, from threads."""
        self._on_loss = on_loss
        for node in self._nodes:
            node.watch(on_loss)

    def reopen(self, *, use_standby: bool) -> list[list[Attachment]]:
        """Bring lost nodes back and open a new generation of sessions on all of them.

        All nodes lose their KV cache by that: requests are computed again.

        Args:
            use_standby: Replace lost nodes that are not back.

        Returns:
            Per rank, one attachment per node.

        Raises:
            MemoryNodeError: A node is not back, or holds less than before.
        """
        self.generation += 1
        try:
            for node in self._nodes:
                node.check()
            failed = self._restart()
            for node in list(self._nodes):
                if node.is_lost:
                    self._bring_back(node, failed.get(node), use_standby=use_standby)
                else:
                    self._renew(node)
            return self._open()
        finally:
            if self._is_closed:
                self.close()  # What was started and joined meanwhile.

    def check_health(self) -> None:
        """Ask every node for its free memory.

        Raises:
            MemoryNodeError: A node does not answer.
        """
        for node in self._nodes:
            node.refresh_info()

    def request_stop(self) -> None:
        """Ask nodes of ours to end, without waiting for them."""
        for node in self._nodes:
            node.request_stop()

    def close(self) -> None:
        """Leave all nodes; ours end. Safe to call twice."""
        self._is_closed = True
        for node in self._nodes:
            node.close()

    def _node(self, source: str | Launch) -> NodeHandle:
        config = self._config
        return NodeHandle(
            source, self._connect, config.credentials, config.request_timeout_s
        )

    def _kv_bytes(self, node: NodeHandle, num_engines: int) -> int:
        """Return what all workers together may reserve on a node."""
        if self._config.kv_cache_gib is not None:
            return int(self._config.kv_cache_gib * GIB)
        # The info of joining: no engine of this deployment had taken its share.
        share = node.info.kv_bytes_free // num_engines
        free = node.refresh_info().kv_bytes_free
        return free if num_engines == 1 else min(free, share)

    def _blocks_by_rank(self) -> list[tuple[int, ...]]:
        """Per rank, the reserved blocks of each node."""
        return list(zip(*(node.num_blocks for node in self._nodes), strict=True))

    def _open(self) -> list[list[Attachment]]:
        assert self._limits is not None
        by_node = [
            node.open_sessions(self.generation, self._limits) for node in self._nodes
        ]
        return [list(attachments) for attachments in zip(*by_node, strict=True)]

    def _restart(self) -> dict[NodeHandle, BaseException | None]:
        """Start or find all lost nodes at once; returns why, where one does not."""
        lost = [node for node in self._nodes if node.is_lost]
        with ThreadPoolExecutor(len(self._nodes)) as threads:
            starts = [threads.submit(node.start) for node in lost]
        return {
            node: start.exception() for node, start in zip(lost, starts, strict=True)
        }

    def _renew(self, node: NodeHandle) -> None:
        try:
            node.renew()
        except Exception:
            # Nobody knows what it still holds: it frees everything with the connection.
            node.lose()
            raise

    def _bring_back(
        self, lost: NodeHandle, failed: BaseException | None, *, use_standby: bool
    ) -> None:
        """Connect to a lost node that has started, or let a standby take its place.

        Raises:
            MemoryNodeError: Neither is possible now; names the lost node.
        """
        try:
            if failed is not None:  # Another try may take long, as the first did.
                raise failed
            lost.rejoin(_REJOIN_TIMEOUT_S, self._on_loss)
        except MemoryNodeError:
            if not use_standby or not self._replace(lost):
                raise

    def _replace(self, lost: NodeHandle) -> bool:
        for address in list(self._standby):
            spare = self._node(address)
            spare.take_over(lost)
            try:
                spare.rejoin(_REJOIN_TIMEOUT_S, self._on_loss)
            except MemoryNodeError as error:
                logger.warning("Attention offload: a standby is no help. %s", error)
                continue
            self._nodes[self._nodes.index(lost)] = spare
            self._standby.remove(address)
            if isinstance(lost.source, str):
                self._standby.append(lost.source)
            logger.warning(
                "Attention offload: standby %s takes over from memory node %s",
                address,
                lost.address,
            )
            return True
        return False

    def _log_capacity(self, reason: str) -> None:
        for node in self._nodes:
            logger.info(
                "Attention offload: memory node %s (%s, %s kernel) holds %s of "
                "KV cache, %s blocks; limits of the compute host do not apply",
                *(node.address, node.info.device, node.info.attention_kernel),
                byte_size(node.kv_bytes),
                f"{min(node.num_blocks):,}",
            )
        logger.info(
            "Attention offload: %d memory node(s), partition by %s, because %s",
            *(len(self._nodes), self.partition, reason),
        )
