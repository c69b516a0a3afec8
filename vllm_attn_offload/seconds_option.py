# SPDX-License-Identifier: Apache-2.0
"""Seconds as the value of a command's option."""

from __future__ import annotations

import argparse


def seconds(text: str, advice: str) -> float:
    """Read a deadline or an interval.

    Args:
        text: As it was given.
        advice: The last part of the error.

    Raises:
        argparse.ArgumentTypeError: It is no number, or one that nobody can mean.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given. Allowed: seconds from 0.1 to 3600. {advice}"
        )
    return value
