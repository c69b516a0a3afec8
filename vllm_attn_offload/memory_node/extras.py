# SPDX-License-Identifier: Apache-2.0
"""What a node imports beyond the base install, and the extras that bring it."""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = {"torch": ("torch",), "gpu-node": ("torch", "triton")}


def install_command(extra: str) -> str:
    """What a user runs to get an extra."""
    return f"pip install 'vllm-attn-offload[{extra}]'"


def missing_modules(extra: str) -> str:
    """Names of the extra's modules that are not installed here, in words, or ""."""
    return " and ".join(name for name in _MODULES[extra] if find_spec(name) is None)


def check_extra(extra: str, given: str, allowed: str) -> None:
    """Check that the modules of an extra are installed; imports none of them.

    Args:
        extra: A name in ``extras_require`` of ``setup.py``.
        given: The option that needs it, as the user writes it.
        allowed: Options that need no extra.

    Raises:
        ValueError: One of them is missing.
    """
    if missing := missing_modules(extra):
        raise ValueError(
            f"{given} was given, and there is no {missing} here. Allowed without: "
            f"{allowed}. Leave the option out, or run: {install_command(extra)}"
        )
