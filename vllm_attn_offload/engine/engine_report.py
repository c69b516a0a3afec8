# SPDX-License-Identifier: Apache-2.0
"""What an engine says of its KV pool, in metrics, logs and traces."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_attn_offload.engine.engine_board import EngineBoard
from vllm_attn_offload.engine.engine_identity import EngineIdentity
from vllm_attn_offload.engine.recovery_times import RecoveryTimes
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.metrics.engine_state import EngineState
from vllm_attn_offload.worker.spans import Attributes, Spans

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


class EngineReport:
    """Tells how the pool of an engine is; callable from any thread.

    Args:
        state: Names the engine.
        show: Called with every new state.
        spans: Where vLLM writes traces.
    """

    def __init__(
        self,
        state: EngineState,
        show: Callable[[EngineState], None],
        spans: Spans | None = None,
    ) -> None:
        self._state = state
        self._show = show
        self._spans = spans
        self._recovery: RecoveryTimes | None = None
        self._lock = threading.RLock()

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig) -> EngineReport:
        """Return one that shows the engine to its frontends, if they have a board."""
        engine = EngineIdentity.of(vllm_config)
        board = EngineBoard.find()
        show = board.write if board is not None else lambda state: None
        state = EngineState(engine.model, engine.index)
        return cls(state, show, Spans.of_engine(vllm_config))

    def span(
        self, name: str, attributes: Attributes
    ) -> contextlib.AbstractContextManager[None]:
        """Write a span of a block, where vLLM writes traces."""
        if self._spans is None:
            return contextlib.nullcontext()
        return self._spans.around(name, attributes)

    def open_pool(self, num_blocks: int) -> None:
        """Show the size of the pool, once workers use it."""
        self._change(num_pool_blocks=num_blocks)

    def begin_recovery(self, error: MemoryNodeError) -> None:
        """Show that a node is lost; another loss before the end is part of this one."""
        with self._lock:
            if self._recovery is None:
                self._recovery = RecoveryTimes(error, time.monotonic())
            self._change(is_recovering=True)

    def note_dropped(self) -> None:
        """Record that no step is in flight any more."""
        with self._lock:
            if self._recovery is not None:
                self._recovery.dropped_s = time.monotonic()

    def note_reopened(self) -> None:
        """Show that nodes are back; an engine without requests goes on much later."""
        with self._lock:
            if self._recovery is not None:
                self._recovery.reopened_s = time.monotonic()
            self._change(is_recovering=False)

    def note_recomputed(self, num_tokens: int) -> None:
        """Count tokens that are computed again."""
        with self._lock:
            if self._recovery is not None:
                self._recovery.num_tokens += num_tokens
            self._change(
                num_recomputed_tokens=self._state.num_recomputed_tokens + num_tokens
            )

    def end_recovery(self, generation: int) -> None:
        """Count a recovery: workers have sessions of this generation."""
        with self._lock:
            recovery, self._recovery = self._recovery, None
            if recovery is None:
                return
            ended_s = time.monotonic()
            seconds = recovery.seconds(ended_s)
            self._change(
                generation=generation,
                num_recoveries=self._state.num_recoveries + 1,
                recovery_s=self._state.recovery_s + seconds,
                last_recovery_s=seconds,
            )
        logger.info("Attention offload: %s", recovery.describe(ended_s, generation))
        if self._spans is not None:
            recovery.write(self._spans, ended_s, generation)

    def give_up(self, error: MemoryNodeError) -> None:
        """Write the trace of a recovery that failed."""
        with self._lock:
            recovery, self._recovery = self._recovery, None
        if self._spans is not None and recovery is not None:
            generation = self._state.generation
            recovery.write(self._spans, time.monotonic(), generation, str(error))

    def _change(self, **fields: Any) -> None:
        with self._lock:
            self._state = msgspec.structs.replace(self._state, **fields)
            self._show(self._state)
