# SPDX-License-Identifier: Apache-2.0
"""Console commands; each imports only what it needs."""

from __future__ import annotations

import sys


def memory_node_main() -> int:
    """``vllm-memory-node``: run one memory node."""
    from vllm_attn_offload.memory_node.main import main as run

    return run()


def main() -> int:
    """``vllm-attn-offload``: plan, look at and check a deployment."""
    from vllm_attn_offload.commands import main as run

    return run(sys.argv[1:])
