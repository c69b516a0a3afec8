# SPDX-License-Identifier: Apache-2.0
"""Memory of one node for one rank."""

from __future__ import annotations

import dataclasses

import msgspec

from vllm_attn_offload.protocol.messages import ReserveCapacity


@dataclasses.dataclass(slots=True)
class RankShare:
    """Memory of a node for one rank; ``request`` is what to ask for next time."""

    request: ReserveCapacity
    reservation: str = ""
    num_reserved: int = 0
    num_opened: int = 0

    def limit(self, num_blocks: int) -> None:
        """Ask for no more memory than the blocks in use need."""
        self.num_opened = num_blocks
        needed = min(num_blocks, self.num_reserved)
        self.ask(self.request.kv_bytes * needed // self.num_reserved)

    def ask(self, kv_bytes: int) -> None:
        """Change what is asked for the next time."""
        self.request = msgspec.structs.replace(self.request, kv_bytes=kv_bytes)
