# SPDX-License-Identifier: Apache-2.0
"""Why an engine did not start, told last: vLLM's frontend only says that it did not."""

from __future__ import annotations

import atexit
import functools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

from vllm_attn_offload.engine.outage_board import OutageBoard
from vllm_attn_offload.engine.outage_notice import Outage
from vllm_attn_offload.errors import MemoryNodeError, RankSilentError
from vllm_attn_offload.logger import get_logger

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

    from vllm_attn_offload.worker.failure_note import FailureNote

logger = get_logger(__name__)


class _Starting(Protocol):
    parallel_config: ParallelConfig
    failure_note: FailureNote | None


_ExecutorT = TypeVar("_ExecutorT", bound=_Starting)
_P = ParamSpec("_P")
_ResultT = TypeVar("_ResultT")


def tells_why(
    start: Callable[Concatenate[_ExecutorT, _P], _ResultT],
) -> Callable[Concatenate[_ExecutorT, _P], _ResultT]:
    """Show the frontend the sentence with which a method of an executor fails.

    Where a worker failed it is the worker's sentence, and the method raises that.
    """

    @functools.wraps(start)
    def wrapper(executor: _ExecutorT, *args: _P.args, **kwargs: _P.kwargs) -> _ResultT:
        try:
            return start(executor, *args, **kwargs)
        except (MemoryNodeError, RankSilentError, ValueError) as error:
            _show(executor, error)
            raise
        except Exception as error:
            if sentence := _sentence_of_worker(executor):
                _show(executor, ValueError(sentence))
                raise ValueError(sentence) from error
            raise

    return wrapper


def _sentence_of_worker(executor: _Starting) -> str:
    return executor.failure_note.read() if executor.failure_note else ""


def _show(executor: _Starting, error: Exception) -> None:
    board = OutageBoard.find()
    if board is None:  # No frontend of ours configured this engine.
        return
    node, cause = "", str(error)
    if isinstance(error, MemoryNodeError):
        node, cause = error.node, error.cause
    now = time.monotonic()
    outage = Outage(node, cause, now, now, now, is_final=True)
    board.write(executor.parallel_config.data_parallel_index, outage)


def say_why_at_exit(board: OutageBoard) -> None:
    """Log the sentence behind the traceback with which this process ends, if any."""
    atexit.register(_say_why, board)


def _say_why(board: OutageBoard) -> None:
    if not hasattr(sys, "last_value"):
        return  # No exception ended the process, so the caller has dealt with it.
    for outage in filter(None, board.read()):
        if outage.is_final:
            node = f"Memory node {outage.node}: " if outage.node else ""
            logger.error("%s%s", node, outage.cause)
