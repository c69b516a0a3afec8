# SPDX-License-Identifier: Apache-2.0
"""The states of a node's process."""

from __future__ import annotations

from enum import Enum


class NodeState(Enum):
    """What a node does: the words of ``/readyz`` and of its metrics."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
