# SPDX-License-Identifier: Apache-2.0
"""Errors say what was given and what to do, in words that are not Python's."""

from __future__ import annotations

import re

from error_texts import INTERNAL, PYTHON, error_texts

_FILLED_IN = re.compile(r"\{[^{}]*\}")
#: Names of the protocol's messages; and sentences that complete another error, or hold
#: one whole.
_MESSAGE_NAMES = re.compile(r"\{type\((request|reply)\).__name__\}")
COMPLETED = {
    "here, {error}",
    "the private key is encrypted",
    "{device.name}: more than {MAX_HOMOGENEOUS} are needed.",
    "{untested_message(version)} {PATCH_FREE}",
}
#: A node says them to a client that breaks the protocol: no user can cause them.
TO_A_BROKEN_CLIENT = {
    "the attach token is wrong or was used before",
    "this connection has no such unopened reservation",
    "this connection has no such reservation",
    "there is no open session {request.session}",
    "generation {request.generation} of the session is over; {session.generation} is "
    "current",
    "layer {layer.name} names KV group {layer.group}, which is missing",
    "layer {layer.name} has {layer.num_query_heads} query heads for "
    "{layer.num_kv_heads} KV heads; it must be a multiple",
    "{type(request).__name__} is not allowed here",
}


def test_the_walk_sees_errors() -> None:
    """Exceptions, rules about configurations, and what parsers refuse."""
    kinds = {each.error for each in error_texts()}
    assert {"ValueError", "MemoryNodeError", "Unsupported"} <= kinds
    assert len(list(error_texts())) > 150


def test_no_word_of_python() -> None:
    """Neither in the text, nor a class name that is filled in."""
    wrong = []
    for each in error_texts():
        text = _MESSAGE_NAMES.sub("", each.text)
        names = "__name__" if "__name__" in text else ""
        found = PYTHON.search(_FILLED_IN.sub("", text) + names)
        if found and each.error not in INTERNAL:
            wrong.append(f"{each.where}: {found[0]!r} in: {each.text}")
    assert not wrong, "\n".join(wrong)


def test_errors_say_what_to_do() -> None:
    """Two sentences at least: what was given, and what to do."""
    wrong = [
        f"{each.where}: {each.text}"
        for each in error_texts()
        if each.error not in INTERNAL and not each.advice
        if each.text not in COMPLETED | TO_A_BROKEN_CLIENT
    ]
    assert not wrong, "\n".join(wrong)
