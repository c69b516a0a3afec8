# SPDX-License-Identifier: Apache-2.0
"""Restores an engine's KV pool after a memory node was lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from vllm_attn_offload.client.attachment import Attachment, NodeFailure
from vllm_attn_offload.engine.engine_report import EngineReport
from vllm_attn_offload.engine.loss_history import LossHistory
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.engine.outage_notice import OutageNotice
from vllm_attn_offload.errors import MemoryNodeError, NodeDefectError
from vllm_attn_offload.logger import get_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 2.0


class Recovery:
    """State of lost KV blocks, shared by an engine's executor and scheduler.

    Blocks belong to a *generation* of sessions. A loss of the generation in use makes
    recovery pending: a thread brings the nodes back and opens the next generation; the
    engine's own thread drops all computed tokens, then calls ``finish``, which gives
    the new sessions to the workers. In between, no computed result is used. A node that
    answers but refuses its work would refuse it again: that ends the engine, as does a
    node that says twice, without a decoded token in between, why it cannot compute.

    Args:
        pool: The engine's memory nodes.
        attach: Gives sessions to all workers; returns each worker's failure, if any.
        timeout_s: Deadline from a loss to ``finish``.
        give_up: Called if the engine cannot go on.
        notice: Shows that nodes are away.
        report: Says how recoveries went.
    """

    _of_engine: ClassVar[dict[str, Recovery]] = {}

    def __init__(
        self,
        pool: NodePool,
        attach: Callable[[list[list[Attachment]]], list[NodeFailure | None]],
        timeout_s: float,
        give_up: Callable[[MemoryNodeError], None],
        notice: OutageNotice,
        report: EngineReport,
    ) -> None:
        self._pool = pool
        self._attach = attach
        self._timeout_s = timeout_s
        self._give_up = give_up
        self._notice = notice
        self._report = report
        self._history = LossHistory(timeout_s)
        self._changed = threading.Condition()
        self._attached, self._lost = 0, -1
        self._is_reopening = False
        self._is_closed = False
        self._reopened: list[list[Attachment]] = []
        self._started_s = 0.0
        self._error: MemoryNodeError | None = None
        self._end: MemoryNodeError | None = None
        self._num_attempts = 0
        self._logged: set[str] = set()
        #: Called, in a thread, when the pool is back with nothing in it.
        self.on_back: Callable[[], None] = lambda: None
        # Now: where a loss is noticed, there may be no room for a thread.
        threading.Thread(
            target=self._run, name="MemoryNodeRecovery", daemon=True
        ).start()

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
            self._lost, self._error = generation, error
            if isinstance(error, NodeDefectError) or self._history.failed_before(
                error, time.monotonic()
            ):
                self._end_with(error)
            elif self.is_pending and not self._is_reopening:
                logger.error(
                    "Attention offload: %s What it held is computed again.", error
                )
                self._begin(error)

    @property
    def is_on_trial(self) -> bool:
        """True from a recovery until ``note_progress``."""
        return self._history.num_fruitless > 0

    def note_progress(self) -> None:
        """Record that a step decoded a token since the last loss."""
        self._history.note_progress()

    def note_recomputed(self, num_tokens: int) -> None:
        """Count tokens of running requests that are computed again."""
        self._report.note_recomputed(num_tokens)

    def finish(self) -> None:
        """Wait for new sessions and give them to the workers; in the engine's thread.

        Raises:
            MemoryNodeError: The nodes are not back in time, are lost repeatedly, or
                refuse their work.
            RankSilentError: A worker does not take its sessions.
        """
        self._report.note_dropped()
        self._history.note_loss(self._started_s)
        while self.is_pending:
            attachments = self._wait_for_sessions()
            generation = attachments[0][0].generation
            problems = [problem for problem in self._attach(attachments) if problem]
            if problems:
                self._try_again(MemoryNodeError(*problems[0]), generation)
                continue
            self._history.note_attached()
            with self._changed:
                self._attached = generation
                # A loss that is noticed now begins the next recovery.
                if not self.is_pending:
                    self._report.end_recovery(generation)
        self._history.note_recovery(time.monotonic())

    def close(self) -> None:
        """Stop; later losses are ignored."""
        for engine in [e for e, mine in self._of_engine.items() if mine is self]:
            del self._of_engine[engine]
        self._notice.close()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait_for_sessions(self) -> list[list[Attachment]]:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._is_reopening or self._is_closed or self._end,
                max(0.0, self.remaining_s()),
            )
            if self._is_closed and self._end is None:
                raise self._late()
            if self._is_reopening:
                self._end_with(self._late())
            elif self._history.is_hopeless:
                self._end_with(
                    self._failed(
                        f"nodes were lost {self._history.num_fruitless + 1} times in a "
                        "row without a decoded token in between."
                    )
                )
            if self._end is not None:
                raise self._end
            return self._reopened

    def _begin(self, error: MemoryNodeError) -> None:
        self._is_reopening = True
        self._started_s = time.monotonic()
        self._num_attempts = 0
        self._logged.clear()
        self._report.begin_recovery(error)
        self._notice.begin(error)
        self._changed.notify_all()

    def _try_again(self, error: MemoryNodeError, generation: int) -> None:
        """Open another generation, because a worker cannot use this one."""
        self._note_failure(error)
        with self._changed:
            if generation > self._lost:
                self._report.begin_recovery(error)
                self._lost = generation
                self._is_reopening = True
                self._changed.notify_all()

    def _end_with(self, error: MemoryNodeError) -> None:
        with self._changed:
            if self._end is not None:
                return
            self._end = error
            # Before the engine's thread raises it: frontends ask for the reason then.
            self._notice.give_up(error)
            self._report.give_up(error)
            self._changed.notify_all()
        self._give_up(error)

    def remaining_s(self) -> float:
        """Seconds to the deadline of the last loss; negative where it has passed."""
        return self._started_s + self._timeout_s - time.monotonic()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_reopening or self._is_closed)
                if self._is_closed or self._end is not None:
                    return
            self._reopen()

    def _reopen(self) -> None:
        """Retry until a new generation is open that was not reported as lost."""
        while self._may_try():
            try:
                attachments = self._pool.reopen(use_standby=self._num_attempts > 0)
            except Exception as error:
                # Not only of nodes: descriptors, processes or memory may be short.
                self._note_failure(error)
                continue
            with self._changed:
                is_back = self._lost < self._pool.generation
                if is_back:
                    self._reopened, self._is_reopening = attachments, False
                    self._report.note_reopened()
                    self._notice.end()
                    self._changed.notify_all()
            if is_back:
                self.on_back()
                return

    def _note_failure(self, error: Exception) -> None:
        self._num_attempts += 1
        is_of_node = isinstance(error, MemoryNodeError)
        text = str(error) if is_of_node else f"{type(error).__name__}: {error}"
        if text not in self._logged:
            self._logged.add(text)
            logger.warning(
                "Attention offload: attempt %d to bring the memory nodes back failed. "
                "%s",
                self._num_attempts,
                text,
            )

    def _may_try(self) -> bool:
        """Wait before another attempt; False where there is to be none."""
        attempts = self._num_attempts
        delay_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**attempts) if attempts else 0.0
        with self._changed:
            if self._changed.wait_for(
                lambda: self._is_closed or self._end is not None,
                min(delay_s, max(0.0, self.remaining_s())),
            ):
                return False
        if self.remaining_s() > 0:
            return True
        self._end_with(self._late())
        return False

    def _late(self) -> MemoryNodeError:
        return self._failed("it was not back in time.")

    def _failed(self, why: str) -> MemoryNodeError:
        assert self._error is not None
        return MemoryNodeError(
            self._error.node,
            f"{why} Within {self._timeout_s:g} s (recovery_timeout_s) a node must be "
            "back or a standby take over. The engine stops; see the node's log.",
        )
