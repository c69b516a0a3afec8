# SPDX-License-Identifier: Apache-2.0
"""What a check found, in the three parts of an error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warn", "fail"]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")
_SHOWN_CHARS = 400


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report, and what to do where something is wrong.

    Attributes:
        check: What was looked at, in one or two words.
        severity: ``warn``: it serves, but worse than it could; ``fail``: it does not.
        found: What is there.
        allowed: What would be right; empty where it is.
        do: What the user does about it; empty where nothing is wrong.
    """

    check: str
    severity: Severity
    found: str
    allowed: str = ""
    do: str = ""

    @classmethod
    def ok(cls, check: str, found: str) -> Finding:
        """Nothing is wrong."""
        return cls(check, "ok", found)

    @classmethod
    def warn(cls, check: str, found: str, allowed: str, do: str) -> Finding:
        """It serves all the same."""
        return cls(check, "warn", found, allowed, do)

    @classmethod
    def fail(cls, check: str, found: str, allowed: str, do: str) -> Finding:
        """It would not serve."""
        return cls(check, "fail", found, allowed, do)

    @classmethod
    def of_error(
        cls, check: str, error: object, allowed: str, do: str = "Correct it."
    ) -> Finding:
        """Divide an error of this package into its parts.

        Args:
            check: As of the finding.
            error: Its text ends with what to do, and may say what is allowed.
            allowed: Where the text does not say it.
            do: Where the text is but one sentence.
        """
        text = " ".join(str(error).split())
        if len(text) > 2 * _SHOWN_CHARS:
            text = f"{text[:_SHOWN_CHARS]} ... {text[-_SHOWN_CHARS:]}"
        found, *others = _SENTENCE_END.split(text)
        said = [each for each in others if each.startswith("Allowed")]
        if not said:
            return cls.fail(check, *_without_allowed(found, others, allowed, do))
        middle = others.index(said[0])
        found = " ".join([found, *others[:middle]]).removesuffix(".")
        advice = " ".join(others[middle + 1 :]) or do
        return cls.fail(check, found, _bare(said[0]), advice)


def _without_allowed(
    found: str, others: list[str], allowed: str, do: str
) -> tuple[str, str, str]:
    if not others:
        return found.removesuffix("."), allowed, do
    return " ".join([found, *others[:-1]]).removesuffix("."), allowed, others[-1]


def _bare(allowed: str) -> str:
    """Without the word that the report puts in front."""
    text = allowed.removeprefix("Allowed: ")
    return text.removesuffix(".")
