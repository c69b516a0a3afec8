# SPDX-License-Identifier: Apache-2.0
"""Restores an engine's KV pool after a memory node was lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from vllm_attn_offload.client.node_client import Attachment, NodeFailure
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.logger import get_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 5.0
#: Losses in a row without a token in between; the requests may be what kills nodes.
_MAX_FRUITLESS = 5


class Recovery:
    """State of lost KV blocks, shared by an engine's executor and scheduler.

    Blocks belong to a *generation* of sessions. A loss of the generation in use makes
    recovery pending: a thread brings the nodes back and opens the next generation; the
    engine's own thread drops all computed tokens, then calls ``finish``, which gives
    the new sessions to the workers. In between, no computed result is used.

    Args:
        pool: The engine's memory nodes.
        attach: Gives sessions to all workers; returns each worker's failure, if any.
        timeout_s: Deadline from a loss to ``finish``.
        give_up: Called once if the deadline cannot be met.
    """

    _of_engine: ClassVar[dict[str, Recovery]] = {}

    def __init__(
        self,
        pool: NodePool,
        attach: Callable[[list[list[Attachment]]], list[NodeFailure | None]],
        timeout_s: float,
        give_up: Callable[[MemoryNodeError], None],
    ) -> None:
        self._pool = pool
        self._attach = attach
        self._timeout_s = timeout_s
        self._give_up = give_up
        self._changed = threading.Condition()
        self._attached = 0
        self._lost = -1
        self._is_reopening = False
        self._is_closed = False
        self._reopened: list[list[Attachment]] = []
        self._started_s = 0.0
        self._reopened_s = 0.0
        self._error: MemoryNodeError | None = None
        self._num_fruitless = 0

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig) -> Recovery:
        """Return the recovery that this engine's executor registered.

        vLLM builds executor and scheduler from one configuration in one process, but
        gives neither of them the other.
        """
        return cls._of_engine[vllm_config.instance_id]

    def register(self, vllm_config: VllmConfig) -> None:
        """Make this the result of ``of_engine``."""
        self._of_engine[vllm_config.instance_id] = self

    @property
    def is_pending(self) -> bool:
        """True while workers and scheduler still refer to lost KV blocks."""
        return self._lost >= self._attached

    def report_loss(
        self, error: MemoryNodeError, generation: int | None = None
    ) -> None:
        """Record a loss; callable from any thread.

        Args:
            error: The node and the cause.
            generation: Generation of the lost session; None for the newest one.
        """
        with self._changed:
            if generation is None:
                generation = self._pool.generation
            if generation <= self._lost or self._is_closed:
                return
            logger.error("Attention offload: %s What it held is computed again.", error)
            self._lost, self._error = generation, error
            if self.is_pending and not self._is_reopening:
                self._is_reopening = True
                self._started_s = time.monotonic()
                threading.Thread(
                    target=self._reopen, name="MemoryNodeRecovery", daemon=True
                ).start()

    def note_progress(self) -> None:
        """Record that a token was produced since the last loss."""
        self._num_fruitless = 0

    def finish(self) -> None:
        """Wait for new sessions and give them to the workers; in the engine's thread.

        Raises:
            MemoryNodeError: The nodes are not back in time, or are lost repeatedly.
        """
        dropped_s = time.monotonic()
        while self.is_pending:
            self._num_fruitless += 1
            attachments = self._wait_for_sessions()
            generation = attachments[0][0].generation
            problems = [problem for problem in self._attach(attachments) if problem]
            with self._changed:
                self._attached = generation
            for problem in problems:
                self.report_loss(MemoryNodeError(*problem), generation)
        logger.info(
            "Attention offload: the memory nodes are back after %.2f s (generation %d; "
            "the step in flight ended after %.2f s, the pool was open after %.2f s)",
            time.monotonic() - self._started_s,
            self._attached,
            dropped_s - self._started_s,
            self._reopened_s - self._started_s,
        )

    def close(self) -> None:
        """Stop; later losses are ignored."""
        for engine in [e for e, mine in self._of_engine.items() if mine is self]:
            del self._of_engine[engine]
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait_for_sessions(self) -> list[list[Attachment]]:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._is_reopening or self._is_closed,
                max(0.0, self._remaining_s()),
            )
            if self._is_reopening or self._is_closed:
                raise self._failed("it was not back in time.")
            if self._num_fruitless > _MAX_FRUITLESS:
                raise self._failed(
                    f"nodes were lost {self._num_fruitless} times in a row without a "
                    "token in between."
                )
            return self._reopened

    def _remaining_s(self) -> float:
        return self._started_s + self._timeout_s - time.monotonic()

    def _reopen(self) -> None:
        """Retry until a new generation is open that was not reported as lost."""
        attempt, delay_s = 0, 0.0
        while self._may_try_after(delay_s):
            try:
                attachments = self._pool.reopen(use_standby=attempt > 0)
            except MemoryNodeError as error:
                attempt += 1
                delay_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**attempt)
                logger.warning(
                    "Attention offload: attempt %d to bring the memory nodes back "
                    "failed. %s",
                    attempt,
                    error,
                )
                continue
            with self._changed:
                if self._lost < self._pool.generation:
                    self._reopened, self._is_reopening = attachments, False
                    self._reopened_s = time.monotonic()
                    self._changed.notify_all()
                    return

    def _may_try_after(self, delay_s: float) -> bool:
        with self._changed:
            if self._changed.wait_for(lambda: self._is_closed, delay_s):
                return False
        if self._remaining_s() > 0:
            return True
        self._give_up(self._failed("it was not back in time."))
        return False

    def _failed(self, why: str) -> MemoryNodeError:
        assert self._error is not None
        return MemoryNodeError(
            self._error.node,
            f"{why} Within {self._timeout_s:g} s (recovery_timeout_s) a node must be "
            "back or a standby take over. The engine stops; see the node's log.",
        )
