# SPDX-License-Identifier: Apache-2.0
"""Memory in which engines show frontends what ``/metrics`` says of them."""

from __future__ import annotations

import msgspec

from vllm_attn_offload.engine.slot_board import SlotBoard
from vllm_attn_offload.metrics.engine_state import EngineState

ENGINE_BOARD_VARIABLE = "ATTN_OFFLOAD_ENGINE_BOARD"
#: More of a model's name is not shown.
_MAX_NAME = 1000


class EngineBoard(SlotBoard):
    """Shows the state of every engine."""

    variable = ENGINE_BOARD_VARIABLE
    file_name = "attn-offload-engines"
    #: Of the longest name, each character of which may become ``\\u0000``.
    slot_bytes = 8192

    def write(self, state: EngineState) -> None:
        """Show the state of an engine."""
        short = msgspec.structs.replace(state, model_name=state.model_name[:_MAX_NAME])
        self._write_slot(state.engine_index, msgspec.json.encode(short))

    def read(self) -> list[EngineState]:
        """Return the state of every engine that ever showed it."""
        return [state for slot in self._read_slots() for state in _states(slot)]


def _states(slot: bytes) -> list[EngineState]:
    try:
        return [msgspec.json.decode(slot, type=EngineState)]
    except msgspec.DecodeError:
        return []  # Empty, or just being written.
