# SPDX-License-Identifier: Apache-2.0
"""Memory in which engines show their outages to the frontends that serve clients."""

from __future__ import annotations

import msgspec

from vllm_attn_offload.engine.outage_notice import Outage
from vllm_attn_offload.engine.slot_board import SlotBoard

BOARD_VARIABLE = "ATTN_OFFLOAD_OUTAGE_BOARD"
#: More of a node's name and of a cause is not shown.
_MAX_TEXT = 1000


class OutageBoard(SlotBoard):
    """Shows the outage of every engine."""

    variable = BOARD_VARIABLE
    file_name = "attn-offload-outages"
    slot_bytes = 4096

    def write(self, engine: int, outage: Outage | None) -> None:
        """Show or clear the outage of an engine.

        Args:
            engine: Data-parallel index.
            outage: None: there is none.
        """
        record = b"-"
        if outage is not None:
            node, cause = outage.node[:_MAX_TEXT], outage.cause[:_MAX_TEXT]
            short = msgspec.structs.replace(outage, node=node, cause=cause)
            record = msgspec.json.encode(short)
        self._write_slot(engine, record)

    def read(self) -> list[Outage | None]:
        """Return the outage of every engine that ever showed its state."""
        return [_outage(slot) for slot in self._read_slots()]


def _outage(slot: bytes) -> Outage | None:
    try:
        return msgspec.json.decode(slot, type=Outage)
    except msgspec.DecodeError:
        return None  # Empty, or just being written.
