# SPDX-License-Identifier: Apache-2.0
"""Console commands; each imports only what it needs."""

from __future__ import annotations

import sys


def memory_node_main() -> int:
    """``vllm-memory-node``: run one memory node."""
    from vllm_attn_offload.memory_node.main import main as run

    return run()


def main() -> int:
    """``vllm-attn-offload``: plan a deployment, calibrate, or have Ray place nodes."""
    from vllm_attn_offload.planner.cli import main as run

    return run(sys.argv[1:])
