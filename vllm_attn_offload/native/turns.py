# SPDX-License-Identifier: Apache-2.0
"""A turn that C code may hold, too (``csrc/turn.cpp``)."""

from __future__ import annotations

import ctypes
from ctypes import c_int32

from vllm_attn_offload.native.library import open_library

_FREE, _TAKEN, _WANTED = range(3)


class TurnWord:
    """A word in memory that says who has the turn: nobody, somebody, or others wait.

    Args:
        library: The C library, with the GIL kept: none of its calls blocks.
    """

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._word = c_int32(_FREE)
        self._ref = ctypes.byref(self._word)
        self._take, self._ask = library.ao_turn_take, library.ao_turn_ask
        self._set = library.ao_turn_set

    @property
    def address(self) -> int:
        """Where the word is."""
        return ctypes.addressof(self._word)

    def take_or_ask(self) -> bool:
        """Take the turn, or say that somebody waits for it; True if it was taken."""
        while not self._take(self._ref):
            if self._ask(self._ref):
                return False
        return True

    def end(self) -> None:
        """End a turn that nobody waits for."""
        self._set(self._ref, _FREE)

    def pass_on(self, *, is_wanted: bool) -> None:
        """Give the turn to who waited; others may wait still."""
        self._set(self._ref, _WANTED if is_wanted else _TAKEN)


class PlainTurn:
    """The same without the C library: only Python takes turns."""

    address = 0

    def __init__(self) -> None:
        self._is_taken = False

    def take_or_ask(self) -> bool:
        """As `TurnWord.take_or_ask`."""
        was_taken, self._is_taken = self._is_taken, True
        return not was_taken

    def end(self) -> None:
        """As `TurnWord.end`."""
        self._is_taken = False

    def pass_on(self, *, is_wanted: bool) -> None:
        """As `TurnWord.pass_on`."""


def create_turn() -> TurnWord | PlainTurn:
    """A turn that nobody has.

    Raises:
        RuntimeError: The library was built from other sources than this package's.
    """
    library = open_library(ctypes.PyDLL)
    return PlainTurn() if library is None else TurnWord(library)
