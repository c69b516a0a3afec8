# SPDX-License-Identifier: Apache-2.0
"""Everything in vLLM that this plugin wraps; README.md lists the same patches."""

from __future__ import annotations

from . import config_file, engine_args
from .patch import Patch, PatchError

__all__ = ["PATCHES", "Patch", "PatchError", "apply_patches", "revert_patches"]

PATCHES = (*engine_args.PATCHES, *config_file.PATCHES)


def apply_patches() -> None:
    """Apply all patches or none.

    Raises:
        PatchError: One of them does not fit the installed vLLM.
    """
    for patch in PATCHES:
        if not patch.is_applied():
            patch.check()
    for patch in PATCHES:
        patch.apply()


def revert_patches() -> None:
    """Put every original back, last first.

    Raises:
        PatchError: Somebody wrapped one of them after us.
    """
    for patch in reversed(PATCHES):
        patch.revert()
