# SPDX-License-Identifier: Apache-2.0
"""Ends an engine together with the frontend that started it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time

from vllm_attn_offload.logger import get_logger

logger = get_logger(__name__)

_SHUTDOWN_TIMEOUT_S = 10.0


def end_with_frontend() -> None:
    """End this engine when the process that started it is gone, even by kill -9.

    vLLM's engine waits for messages from its frontend and would wait for ever: workers,
    memory node and KV cache would stay. In the frontend's process this does nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=_watch_frontend,
            args=(parent.sentinel,),
            name="FrontendMonitor",
            daemon=True,
        ).start()


def _watch_frontend(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    logger.error("The frontend of this engine is gone. The engine stops.")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SHUTDOWN_TIMEOUT_S)
    # Workers and memory nodes watch this process and end with it.
    os._exit(1)
