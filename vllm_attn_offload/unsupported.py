# SPDX-License-Identifier: Apache-2.0
"""One feature that is refused, and what tells that settings ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

DROP = "Drop the option, or run without --attention-offload."
#: Describes what settings ask for; "" where they do not.
Given = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A feature that this release does not support.

    Args:
        feature: Name in the README.
        given: Describes what the settings ask for, or returns "" where they do not.
        allowed: Settings that work instead.
        advice: Instruction to the user.
    """

    feature: str
    given: Given
    allowed: str
    advice: str = "Run this model without --attention-offload."

    def problem(self, settings: object) -> str:
        """Return the three parts of the error, or "" where nothing is wrong."""
        given = self.given(settings)
        return given and (
            f"Attention offloading does not support {given}. Allowed: {self.allowed}. "
            f"{self.advice}"
        )


def is_set(path: str, text: str = "") -> Given:
    """Match an attribute that is set; ``text`` may hold {} for its value."""
    get, text = attrgetter(path), text or path.split(".")[-1]
    return lambda settings: text.format(value) if (value := get(settings)) else ""


def not_in(allowed: tuple[str, ...], path: str, text: str) -> Given:
    """Match an attribute with a value other than these."""
    get = attrgetter(path)
    return lambda settings: (
        "" if str(get(settings)) in allowed else text.format(get(settings))
    )


def above_one(*names: str) -> Given:
    """Match the first of these attributes that is above 1."""
    return lambda settings: next(
        (f"{n}={getattr(settings, n)}" for n in names if getattr(settings, n) > 1), ""
    )
